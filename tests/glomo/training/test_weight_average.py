"""Means of weights in a run: what they are, that they are judged and kept, and that a death changes nothing."""

import json
from dataclasses import replace

import pytest
import torch
from support_transfer import ALONE, CONFIG, PATTERNS, make_task

from glomo.errors import UserError
from glomo.training import checkpoint
from glomo.training.loop import train
from glomo.training.run_folder import RunFolder
from glomo.training.train_config import TrainConfig
from glomo.training.translation import Method, TranslationConfig, train_translation
from glomo.training.weight_average import WeightAverage

EMA, SWA = {"average": "ema", "average_decay": 0.8}, {"average": "swa", "average_from": 4}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)


def run(path, steps=20, hook=lambda step: None, method=None, **options):
    """(folder, the rows, what the weights are after each step)."""
    task, seen = make_task(method or "gradual", hook), {}
    if method is None:
        task.stages, task.groups = None, PATTERNS
    before = task.before_step

    def before_step(step):
        seen[step - 1] = {name: value.clone() for name, value in task.model.state_dict().items()}
        return before(step) if before else 1.0

    task.before_step = before_step
    with RunFolder(path, {"model": {}}) as folder:
        train(task, replace(CONFIG, steps=steps, **options), folder, ALONE)
    seen[steps] = {name: value.clone() for name, value in task.model.state_dict().items()}
    return folder, [json.loads(line) for line in folder.metrics.read_text().splitlines()], seen


@pytest.mark.parametrize(("options", "first", "decay"), [(EMA, 0, 0.8), (SWA, 4, 1.0)], ids=["ema", "swa"])
def test_the_mean_is_that_of_the_formula(tmp_path, options, first, decay):
    folder, rows, seen = run(tmp_path / "with", **options)
    mean = {name: value.double() for name, value in seen[first + 1].items()}
    for t, step in enumerate(range(first + 2, 21), 2):
        share = min(decay, 1 - 1 / t)
        mean = {name: share * value + (1 - share) * seen[step][name] for name, value in mean.items()}
    final = checkpoint.load(folder.final).weights
    for name, value in final.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), mean[name], rtol=1e-4, atol=1e-6)
        else:
            assert value == seen[20][name]
    # training itself is as without; what is validated is the mean, from where there is one
    _, plain, _ = run(tmp_path / "without")
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    judged = [(a["valid_loss"], b["valid_loss"]) for a, b in zip(rows, plain, strict=True) if "valid_loss" in a]
    assert all(a == b for a, b in judged[: first // 2])
    assert all(a != b for a, b in judged[first // 2 + 1 :])


def test_the_best_is_a_mean(tmp_path):
    """It has the loss on which it was chosen."""
    folder, rows, _ = run(tmp_path, **EMA)
    task = make_task("gradual")
    task.model.load_state_dict(checkpoint.load(folder.best).weights)
    assert task.validate()["valid_loss"] == pytest.approx(min(row["valid_loss"] for row in rows if "valid_loss" in row))


class Death(Exception):
    pass


@pytest.mark.parametrize("method", [None, "chain-thaw"])
@pytest.mark.parametrize("options", [EMA, SWA], ids=["ema", "swa"])
def test_a_death_changes_nothing(tmp_path, options, method):
    """Also where a stage goes back to its best weights, from which the mean begins anew."""

    def hook(step):
        if step == 9:
            raise Death

    whole, rows, _ = run(tmp_path / "whole", method=method, **options)
    with pytest.raises(Death):
        run(tmp_path / "killed", hook=hook, method=method, **options)
    killed, again, _ = run(tmp_path / "killed", method=method, **options)
    figures = [[{k: v for k, v in row.items() if k != "seconds"} for row in one] for one in (rows, again)]
    assert figures[0] == figures[1]
    ours, theirs = (checkpoint.load(folder.final).weights for folder in (whole, killed))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_stage_that_goes_back_begins_a_mean(tmp_path):
    """The first validation of the second stage is of the mean over its own steps."""
    _, rows, seen = run(tmp_path, method="chain-thaw", average="swa")
    first = next(row["step"] for row in rows if row["stage"] != rows[0]["stage"])
    judged = next(row for row in rows[first:] if "valid_loss" in row)
    assert rows[judged["step"]]["stage"] == judged["stage"] == rows[first - 1]["stage"]
    own = [seen[step] for step in range(first, judged["step"] + 1)]
    assert len(own) > 1
    task = make_task("chain-thaw")
    task.model.load_state_dict({name: sum(one[name] for one in own) / len(own) for name in own[0]})
    assert task.validate()["valid_loss"] == pytest.approx(judged["valid_loss"], rel=1e-4)


def test_the_mean_begins_anew():
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 1.0, first=1)

    def after(step, value):
        torch.nn.init.constant_(model.weight, value)
        average.update(step)
        with average.averaged():
            found = model.weight.item()
        assert model.weight.item() == value
        return found

    assert [after(step, value) for step, value in enumerate([8.0, 2.0, 4.0, 6.0], 1)] == [8.0, 2.0, 3.0, 4.0]
    average.forget()
    assert [after(step, value) for step, value in enumerate([1.0, 5.0], 5)] == [1.0, 3.0]


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"train\.average is 'ema', and nt-asgd has means of its own"):
        TrainConfig(average="ema", optimizer="nt-asgd")
    with pytest.raises(UserError, match=r"train\.average is 'swa', .* train\.shard divides; give one of them"):
        TrainConfig(average="swa", shard=True)
    with pytest.raises(UserError, match=r"train\.average_decay is 1.5"):
        TrainConfig(average_decay=1.5)
    with pytest.raises(UserError, match=r"train\.average_from is 30; .* below train\.steps, which is 30"):
        TrainConfig(average="swa", average_from=30, steps=30)
    both = TranslationConfig(method=Method(average=2), train=TrainConfig(average="ema"))
    with pytest.raises(UserError, match=r"method\.average is 2 and train\.average 'ema'; give one of them"):
        train_translation(both, tmp_path)
