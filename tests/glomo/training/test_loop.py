"""The loop on a small regression: exact resume, best and last weights, schedules, and every way to stop."""

import dataclasses
import itertools
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn

from glomo.data import BucketBatches
from glomo.errors import UserError
from glomo.training import checkpoint
from glomo.training.distributed import World
from glomo.training.loop import Interrupted, Task, set_up, train
from glomo.training.run_folder import RunFolder
from glomo.training.train_config import TrainConfig

ALONE = World(0, 1, torch.device("cpu"))
CONFIG = TrainConfig(
    steps=12,
    batch_size=4,
    lr=0.05,
    eval_every=4,
    checkpoint_every=3,
    progress=0,
    warmup=2,
    decay="cosine",
    device="cpu",
)


class Death(BaseException):
    pass


def make_task(hook=lambda step: None, target=2.0, valid=None) -> Task:
    """A net with dropout, noise from every random generator in the loss, and a hook that runs inside each step."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    y = target * x.sum(1, keepdim=True)
    steps = itertools.count(1)

    def loss(indices, generator):
        hook(next(steps))
        noise = torch.rand((), generator=generator) + random.random() + float(np.random.rand()) + torch.rand(())
        return (
            (net(x[indices]) - y[indices]).square().mean() + 0.1 * noise * net[0].weight.square().sum(),
            len(indices),
            7,
        )

    def validate():
        net.eval()
        with torch.no_grad():
            return {"valid_loss": float((net(x) - y).square().mean()) if valid is None else next(valid)}

    return Task(net, BucketBatches([1] * 30, 4, 0), loss, validate, {"note": "é"}, {"text": f"target {target}"})


def run(path, config=CONFIG, **kwargs):
    task = make_task(**kwargs)
    with RunFolder(path, {"train": dataclasses.asdict(config)}) as folder:
        row = train(task, config, folder, ALONE)
        return row, [{k: v for k, v in r.items() if k != "seconds"} for r in folder.rows()], task


@pytest.mark.parametrize("deaths", [(1,), (3, 1, 4), (11, 5), (12,)])
def test_resume_after_death_is_exact(tmp_path, deaths):
    _, expected, task = run(tmp_path / "whole")
    assert [row["step"] for row in expected] == list(range(1, 13))

    for death in deaths:

        def die(step, death=death):
            if step == death:
                raise Death

        try:
            run(tmp_path / "broken", hook=die)
        except Death:
            random.seed(death)  # another process would start from other states, too
            torch.manual_seed(death)
    _, found, resumed = run(tmp_path / "broken")
    assert found == expected
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    for part in ("best", "final"):
        whole, broken = (checkpoint.load(tmp_path / which / part) for which in ("whole", "broken"))
        assert whole.meta == broken.meta


def test_a_death_while_saving_is_survived(tmp_path, monkeypatch):
    _, expected, _ = run(tmp_path / "whole")
    calls = itertools.count()
    fsync = os.fsync

    def mortal(handle):
        if next(calls) == 25:
            raise Death
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", mortal)
        with pytest.raises(Death):
            run(tmp_path / "broken")
    assert run(tmp_path / "broken")[1] == expected


def test_a_finished_run_and_a_longer_one(tmp_path):
    constant = dataclasses.replace(CONFIG, decay="constant")
    row, expected, _ = run(tmp_path / "a", constant)
    again, rows, _ = run(tmp_path / "a", constant, hook=lambda step: pytest.fail("trained again"))
    assert again == row
    assert rows == expected
    longer = dataclasses.replace(constant, steps=15)
    _, rows, _ = run(tmp_path / "a", longer)
    assert [r["loss"] for r in rows] == [r["loss"] for r in run(tmp_path / "b", longer)[1]]
    with pytest.raises(UserError, match=r"at step 15 already, past train.steps = 12"):
        run(tmp_path / "a", constant)


@pytest.mark.parametrize("damage", ["cut", "gone", "older"])
def test_final_of_a_finished_run_is_made_again(tmp_path, damage):
    run(tmp_path)
    weights = tmp_path / "final" / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(whole[:50])
    elif damage == "gone":
        weights.unlink()
    else:  # a run that went on died between its last checkpoint and final/
        checkpoint.save(tmp_path / "final", {"w": torch.zeros(1)}, None, {"step": 9})
    run(tmp_path, hook=lambda step: pytest.fail("trained again"))
    assert checkpoint.load(tmp_path / "final").meta["step"] == 12
    assert weights.read_bytes() == whole


def test_more_threads_than_the_machine_can_take_are_refused(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(UserError, match=r"train\.threads is 9; this machine has 2"):
        set_up(TrainConfig(threads=9))


def test_the_checkpoints_that_stay(tmp_path):
    valid = iter([3.0, 1.0, 2.0])
    run(tmp_path, valid=valid)
    assert [p.name for p in checkpoint.step_folders(tmp_path / "checkpoints")] == ["step-000009", "step-000012"]
    best, final = checkpoint.load(tmp_path / "best"), checkpoint.load(tmp_path / "final")
    assert (best.meta["step"], best.meta["valid_loss"], best.state) == (8, 1.0, None)
    assert (final.meta["step"], final.meta["note"]) == (12, "é")


def test_other_data_or_another_model_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match=r"made with another text: its fingerprint was target 2\.0"):
        run(tmp_path, target=3.0)
    task = make_task()
    task.model = nn.Linear(3, 3)
    sections = {"train": dataclasses.asdict(CONFIG)}
    with RunFolder(tmp_path, sections) as folder, pytest.raises(UserError, match="does not fit the model"):
        train(task, CONFIG, folder, ALONE)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    task = make_task()
    loss = task.loss
    steps = itertools.count(1)
    task.loss = lambda *a: (loss(*a)[0] * (math.nan if next(steps) == 8 else 1), 4, 7)
    sentence = "the loss is nan at step 8; the checkpoint of step 6 is whole"
    with RunFolder(tmp_path, {"train": {}}) as folder, pytest.raises(UserError, match=sentence):
        train(task, CONFIG, folder, ALONE)
    assert checkpoint.latest(tmp_path / "checkpoints").state["step"] == 6
    assert all(torch.isfinite(p).all() for p in task.model.parameters())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on(tmp_path, number, code):
    before = signal.getsignal(number)
    _, expected, _ = run(tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped after step 5, which is saved") as stop:
        run(tmp_path / "run", hook=lambda step: os.kill(os.getpid(), number) if step == 5 else None)
    assert stop.value.exit_code == code
    assert signal.getsignal(number) is before
    assert run(tmp_path / "run")[1] == expected


def test_plateau_halves_the_rate_after_patience_and_stops_below_a_hundredth(tmp_path):
    config = dataclasses.replace(
        CONFIG, steps=100, decay="plateau", patience=2, eval_every=1, warmup=0, checkpoint_every=0
    )
    row, rows, _ = run(tmp_path, config, valid=itertools.chain([5.0, 4.0], itertools.repeat(4.0)))
    assert [r["lr"] for r in rows[:7]] == [0.05, 0.05, 0.05, 0.05, 0.025, 0.025, 0.0125]
    assert row["step"] == 2 + 2 * 7  # seven halvings: 1/128
    assert checkpoint.load(tmp_path / "final").meta["step"] == 16
    again, _, _ = run(tmp_path, config, hook=lambda step: pytest.fail("trained again"))
    assert again == row


def test_the_gradient_is_clipped_and_its_norm_reported(tmp_path):
    config = dataclasses.replace(CONFIG, steps=1, optimizer="sgd", lr=1.0, warmup=0, clip=0.25, decay="constant")
    before = [p.detach().clone() for p in make_task().model.parameters()]
    row, _, task = run(tmp_path, config)
    moved = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(task.model.parameters(), before, strict=True))
    )
    assert row["grad_norm"] > 0.25
    assert moved == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("steps", 0), ("batch_size", 0), ("lr", -1.0), ("lr", math.nan), ("clip", math.inf), ("keep", 0)),
        *(("momentum", 1.5), ("seed", 2**63), ("seed", -1), ("progress", -1.0)),
    ],
)
def test_settings_out_of_range(key, value):
    with pytest.raises(UserError, match=f"train.{key} is {value}"):
        TrainConfig(**{key: value})
