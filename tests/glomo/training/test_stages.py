"""Stages in the training loop: killed anywhere and gone on to the same bits, and exactly what each may move."""

import dataclasses
import itertools
import random

import pytest
import torch
from support_transfer import ALONE, CONFIG, METHODS, PATTERNS, Net, make_task

from glomo.errors import UserError
from glomo.training import checkpoint
from glomo.training.loop import train
from glomo.training.run_folder import RunFolder
from glomo.transfer import chain_thaw, gradual_unfreezing

LEARNING = {  # of each stage by its name
    **{"last": ["head"], "last 2": ["layers.1", "head"], "last 3": ["layers.0", "layers.1", "head"]},
    "no embedding": ["layers.0", "layers.1", "head"],
    **{name: [name] for name in ("embedding", "layers.0", "layers.1", "head")},
    "all": ["embedding", "layers.0", "layers.1", "head"],
}


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


class Death(BaseException):
    pass


def run(path, method, hook=lambda step: None, config=CONFIG):
    task = make_task(method, hook)
    with RunFolder(path, {"train": dataclasses.asdict(config)}) as folder:
        row = train(task, config, folder, ALONE)
        return row, [{k: v for k, v in r.items() if k != "seconds"} for r in folder.rows()], task


@pytest.fixture(scope="module", params=METHODS)
def whole(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    return request.param, path, *run(path, request.param)[1:]


@pytest.mark.parametrize("death", [1, 5, 9, 11, 13, 15, 18, 20])
def test_a_death_in_any_stage_changes_nothing(whole, tmp_path, death):
    method, path, expected, task = whole

    def die(step):
        if step == death:
            raise Death

    if death <= len(expected):
        with pytest.raises(Death):
            run(tmp_path, method, die)
    random.seed(death)
    torch.manual_seed(death)
    _, found, resumed = run(tmp_path, method)
    assert found == expected
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    for part in ("best", "final"):
        a, b = (checkpoint.load(folder / part) for folder in (path, tmp_path))
        assert a.meta == b.meta


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_named_groups_move(tmp_path, method):
    _, rows, _ = run(tmp_path, method, config=dataclasses.replace(CONFIG, checkpoint_every=1))
    weights = [checkpoint.load(folder).weights for folder in checkpoint.step_folders(tmp_path / "checkpoints")]
    for row, before, after in zip(rows[1:], weights, weights[1:], strict=False):
        if method == "chain-thaw" and row["stage"] != rows[row["step"] - 2]["stage"]:
            continue  # it also goes back to the best weights between the two
        moved = {name for name, t in after.items() if not torch.equal(t, before[name])}
        assert {name for name in moved if "running" not in name and "num_batches" not in name} == {
            name for name, _ in Net().named_parameters() if name.startswith(tuple(LEARNING[row["stage"]]))
        }
        assert all(name.startswith(tuple(LEARNING[row["stage"]])) for name in moved)


def test_every_stage_is_there(whole):
    method, _, rows, _ = whole
    names = list(dict.fromkeys(row["stage"] for row in rows))
    assert (
        names
        == {
            "gradual": ["last", "last 2", "last 3", "all"],
            "chain-thaw": ["head", "embedding", "layers.0", "layers.1", "all"],
            "sequential": ["last", "no embedding", "all"],
        }[method]
    )


def test_a_stage_goes_back_to_its_best_weights(tmp_path):
    """The second validation is worse: the stage ends, and the next begins from the weights of the first."""
    values = itertools.chain([1.0], itertools.repeat(2.0))
    seen = {}

    def remember(step):
        seen[step] = {n: t.clone() for n, t in task.model.state_dict().items()}

    task = make_task("chain-thaw", remember)
    task.validate = lambda: {"valid_loss": next(values)}
    with RunFolder(tmp_path, {"train": {}}) as folder:
        train(task, CONFIG, folder, ALONE)
        rows = folder.rows()
    assert [row["stage"] for row in rows[:5]] == ["head", "head", "head", "head", "embedding"]
    assert all(torch.equal(t, seen[3][n]) for n, t in seen[5].items())  # as they were behind step 2
    assert not torch.equal(seen[4]["head.weight"], seen[5]["head.weight"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"groups": PATTERNS[1:]}, "in no group: embedding.weight"),
        ({"stages": lambda groups: gradual_unfreezing(groups, 20, 9, 0.1)}, "3 stages of 9 steps leave nothing of 20"),
        ({"validate": None}, "stage 'head' goes by validations, and there are none"),
    ],
)
def test_mistakes(tmp_path, change, sentence):
    task = dataclasses.replace(make_task("chain-thaw"), **change)
    with RunFolder(tmp_path, {"train": {}}) as folder, pytest.raises(UserError, match=sentence):
        train(task, CONFIG, folder, ALONE)


def test_a_run_goes_on_after_a_mistake_is_mended(tmp_path, whole):
    """A wrong pattern in between loses nothing."""
    method, _, expected, _ = whole

    def die(step):
        if step == 8:
            raise Death

    with pytest.raises(Death):
        run(tmp_path, method, die)
    broken = dataclasses.replace(make_task(method), groups=["embedding"])
    with (
        RunFolder(tmp_path, {"train": dataclasses.asdict(CONFIG)}) as folder,
        pytest.raises(UserError, match="no group"),
    ):
        train(broken, CONFIG, folder, ALONE)
    assert run(tmp_path, method)[1] == expected


def test_the_last_step_of_a_stage_is_judged_too(tmp_path):
    """Stages of four steps and validations every three: no step behind the last validation is thrown away."""
    config = dataclasses.replace(CONFIG, eval_every=3, checkpoint_every=1)
    _, rows, _ = run(tmp_path, "chain-thaw", config=config)
    ends = [row["step"] for row, after in itertools.pairwise(rows) if row["stage"] != after["stage"]]
    judged = [row["step"] for row in rows if "valid_loss" in row]
    assert set(ends) <= set(judged)
    assert set(range(3, rows[-1]["step"] + 1, 3)) <= set(judged)


def test_best_weights_stay_where_means_are_taken(tmp_path):
    """nt-asgd in stages that go back: final/ is the last stage's best, not a mean from before it."""
    config = dataclasses.replace(CONFIG, optimizer="nt-asgd", nonmono=1, lr=1.0, eval_every=1, momentum=0.0)
    task = make_task("chain-thaw")
    task.stages = lambda groups: chain_thaw(groups, 20, 1.0, 1.0, patience=2)
    with RunFolder(tmp_path, {"train": {}}) as folder:
        train(task, config, folder, ALONE)
        best = checkpoint.load(folder.stage_best(4)).weights
        assert all(torch.equal(value, best[name]) for name, value in checkpoint.load(folder.final).weights.items())


def test_a_damaged_older_checkpoint_does_not_stop_a_run(tmp_path):
    config = dataclasses.replace(CONFIG, keep=3)

    def die(step):
        if step == 13:
            raise Death

    with pytest.raises(Death):
        run(tmp_path, "gradual", die, config)
    (tmp_path / "checkpoints" / "step-000006" / "meta.json").write_text("{")
    assert run(tmp_path, "gradual", config=config)[0]["step"] == 20
