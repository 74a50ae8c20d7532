"""Checkpoints: what goes in comes out, damage is noticed, and a death or a full disk loses nothing older."""

import contextlib
import errno
import json
import os
import pickle

import pytest
import torch
from torch import nn

from glomo.errors import UserError
from glomo.training import checkpoint


def tied_model() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(3, 4, bias=False), "b": nn.Linear(3, 4, bias=False), "n": nn.BatchNorm1d(2)})
    model["b"].weight = model["a"].weight
    return model


def save(folder, number=1.0, state=None):
    checkpoint.save(folder, {"w": torch.full((50,), number)}, state or {"step": number}, {"step": number})


def test_weights_state_and_meta_come_back(tmp_path):
    model = tied_model()
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"step": 7, "optimizer": optimizer.state_dict(), "best": float("inf"), "rng": torch.get_rng_state()}
    checkpoint.save(tmp_path / "c", model.state_dict(), state, {"step": 7, "words": ["é", "b"]})
    found = checkpoint.load(tmp_path / "c")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.weights[name], value, rtol=0, atol=0)
    tied_model().load_state_dict(found.weights)
    assert found.meta["tied"] == {"b.weight": "a.weight"}
    assert found.meta["words"] == ["é", "b"]
    assert found.state["step"] == 7
    assert torch.equal(found.state["rng"], state["rng"])
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["meta.json", "model.safetensors", "train_state.pt"]


def test_views_and_odd_strides_are_saved_as_they_read(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    weights = {"t": base.t(), "row": base[1], "empty": base[:0], "none": base[:, :0]}
    checkpoint.save(tmp_path / "c", weights, None, {})
    found = checkpoint.load(tmp_path / "c")
    assert found.state is None
    for name, value in weights.items():
        assert torch.equal(found.weights[name], value)


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["half", "missing", "flip"])
def test_damage_is_named_and_the_older_one_is_used(tmp_path, name, damage, capsys):
    save(tmp_path / "step-000010", 10.0)
    save(tmp_path / "step-000020", 20.0)
    file = tmp_path / "step-000020" / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 255
        file.write_bytes(data[: len(data) // 2] if damage == "half" else data)
    with pytest.raises(UserError, match=f"not a whole checkpoint.*{name}"):
        checkpoint.load(tmp_path / "step-000020")
    found = checkpoint.latest(tmp_path)
    assert found.state == {"step": 10.0}
    assert f"{name}" in (said := capsys.readouterr().err)
    assert "going back to step-000010" in said


def test_nothing_whole_is_an_error_and_nothing_at_all_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path / "step-000010")
    (tmp_path / "step-000010" / "meta.json").write_text("{")
    with pytest.raises(UserError, match="no older one is whole"):
        checkpoint.latest(tmp_path)
    with pytest.raises(UserError, match="no checkpoint folder"):
        checkpoint.load(tmp_path / "absent")


def test_a_pickle_is_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    save(tmp_path / "c")
    evil = pickle.dumps(Bomb(), protocol=2)
    (tmp_path / "c" / "train_state.pt").write_bytes(evil)
    meta = json.loads((tmp_path / "c" / "meta.json").read_text())
    meta["sha256"]["train_state.pt"] = __import__("hashlib").sha256(evil).hexdigest()
    (tmp_path / "c" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"train_state\.pt holds more than tensors"):
        checkpoint.load(tmp_path / "c")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("fails_at", range(5))
def test_a_full_disk_leaves_everything_older_readable(tmp_path, monkeypatch, fails_at):
    save(tmp_path / "step-000010", 10.0)
    save(tmp_path / "best", 10.0)
    calls = []
    fsync = os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) > fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    for target in ("step-000020", "best"):  # a new one, and one that replaces an older one
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match=r"cannot save .*No space left on device.*saved before is whole"):
                save(tmp_path / target, 20.0)
    checkpoint.recover(tmp_path)
    assert checkpoint.load(tmp_path / "step-000010").state == {"step": 10.0}
    assert checkpoint.load(tmp_path / "best").state["step"] in (10.0, 20.0)  # 20: only the last flush failed
    assert not list(tmp_path.glob(".tmp-*"))


class Death(BaseException):
    """Stands for kill -9: nothing in the code under test may catch it."""


@pytest.mark.parametrize("dies_at", range(8))
def test_a_death_at_any_moment_of_replacing_loses_nothing(tmp_path, monkeypatch, dies_at):
    save(tmp_path / "best", 10.0)
    count = 0

    def mortal(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > dies_at:
                raise Death
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", mortal(os.fsync))
        patch.setattr(checkpoint.Path, "rename", mortal(checkpoint.Path.rename))
        patch.setattr(checkpoint.shutil, "rmtree", mortal(checkpoint.shutil.rmtree))
        with contextlib.suppress(Death):
            save(tmp_path / "best", 20.0)
    checkpoint.recover(tmp_path)
    assert checkpoint.load(tmp_path / "best").state["step"] in (10.0, 20.0)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_the_newest_stay(tmp_path):
    for step in (5, 999_999, 20, 1_000_000):
        save(tmp_path / f"step-{step:06}")
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == ["step-999999", "step-1000000"]
