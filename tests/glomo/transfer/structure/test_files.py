"""A task's file: small, whole, and put back to the bit."""

import copy
import json

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from glomo.errors import UserError
from glomo.transfer.structure import (
    ParallelAdapter,
    add,
    bottleneck,
    load_adapters,
    lora,
    low_rank,
    merge,
    parallel_bottleneck,
    parallel_residual,
    projected_attention,
    save_adapters,
    serial_residual,
    unmerge,
)
from glomo.transfer.structure.files import _KINDS


class Network(nn.Module):
    """Room for every kind of adapter; the logits' matrix is the embedding's."""

    def __init__(self, width=6, units=11):
        super().__init__()
        self.embedding = nn.Embedding(units, width)
        self.lstm = nn.LSTM(width, width)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 8, 0.0) for _ in range(2))
        self.convolution = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 4)
        self.logits = nn.Linear(width, units, bias=False)
        self.logits.weight = self.embedding.weight

    def forward(self, units):
        h = self.lstm(self.embedding(units))[0]
        for layer in self.layers:
            h = layer(h)
        h = self.norm(self.convolution(h.movedim(0, -1)))
        return self.head(h.mean(-1)), self.logits(h.mean(-1))


def with_all(model):
    add(model, "embedding|lstm|head", lora(2))
    add(model, r"convolution", lora(3, 6.0, 0.5))
    add(model, r"layers\.\d\.self_attn", bottleneck(3), "after")
    add(model, r"layers\.\d\.self_attn", parallel_bottleneck(2, "silu", 1.5), "beside")
    add(model, r"layers\.\d", projected_attention(6, 2, into="dropout2", width=6))
    add(model, r"layers\.0", low_rank(3, into="linear2"), "low")
    add(model, "convolution", serial_residual(), "serial")
    add(model, "convolution", parallel_residual(), "parallel")
    return model


HEAD = ["head", "norm"]


@pytest.fixture
def base():
    torch.manual_seed(5)
    return Network()


@pytest.fixture
def tuned(base, stir, units):
    """Adapters, the head and BatchNorm's statistics are other than in the base."""
    model = stir(with_all(copy.deepcopy(base)))
    for _ in range(2):
        model(units)
    nn.init.normal_(model.head.weight)
    return model.eval()


def test_the_same_to_the_bit(base, tuned, units, tmp_path):
    save_adapters(tuned, tmp_path / "task.safetensors", HEAD)
    state = torch.get_rng_state()
    places = load_adapters(base, tmp_path / "task.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert places.count("layers.0") == 2
    assert {"embedding", "lstm", "head", "convolution", "layers.1.self_attn"} <= set(places)
    for found, expected in zip(base.eval()(units), tuned(units), strict=True):
        assert torch.equal(found, expected)
    assert list(base.state_dict()) == list(tuned.state_dict())
    assert all(torch.equal(value, tuned.state_dict()[name]) for name, value in base.state_dict().items())
    assert base.layers[0].adapter.decoder.weight is base.layers[1].adapter.decoder.weight  # shared again
    assert base.logits.weight is base.embedding.weight
    assert {n: p.requires_grad for n, p in base.named_parameters()} == {
        n: p.requires_grad for n, p in tuned.named_parameters()
    }
    save_adapters(base, tmp_path / "again.safetensors", HEAD)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "task.safetensors").read_bytes()


def test_every_kind_is_tested(tuned):
    kinds = {type(module).__name__ for module in tuned.modules()}
    assert set(_KINDS) - kinds == set()


def test_the_file_is_small(tuned, tmp_path):
    """Adapters and head alone, a shared weight once."""
    path = tmp_path / "task.safetensors"
    save_adapters(tuned, path, HEAD)
    needed = {id(p): p.numel() * p.element_size() for one in (tuned.head, tuned.norm) for p in one.state_dict(
        keep_vars=True
    ).values()}  # fmt: skip
    for name, value in tuned.state_dict(keep_vars=True).items():
        if any(f".{kind}." in name for kind in ("adapter", "after", "beside", "low", "serial", "parallel")):
            needed[id(value)] = value.numel() * value.element_size()
    with safetensors.safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
        sizes = [file.get_tensor(name).numel() * file.get_tensor(name).element_size() for name in names]
    assert sum(sizes) == sum(needed.values())
    assert not any(name.startswith(("embedding.weight", "logits")) for name in names)
    meta = json.loads(metadata["glomo.adapters"])
    assert meta["tied"]["layers.1.adapter.encoder.weight"] == "layers.0.adapter.encoder.weight"


def test_a_tied_head_is_written_once_and_tied_again(base, stir, units, tmp_path):
    path, model = tmp_path / "task.safetensors", copy.deepcopy(base)
    add(model, "head", lora(2))
    nn.init.normal_(stir(model).logits.weight)
    save_adapters(model, path, ["logits", "embedding"])
    assert sum(name.endswith(".weight") for name in safetensors.torch.load_file(path)) == 1
    load_adapters(base, path)
    assert base.logits.weight is base.embedding.weight
    assert all(torch.equal(a, b) for a, b in zip(base.eval()(units), model.eval()(units), strict=True))


def test_a_compiled_model(base, tuned, tmp_path):
    compiled = torch.compile(tuned, backend="eager")
    save_adapters(compiled, tmp_path / "task.safetensors", HEAD)
    assert not any("_orig_mod" in name for name in safetensors.torch.load_file(tmp_path / "task.safetensors"))
    other = torch.compile(base, backend="eager")
    load_adapters(other, tmp_path / "task.safetensors")
    assert all(torch.equal(value, tuned.state_dict()[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_keep_their_dtype(base, stir, dtype, tmp_path):
    model = copy.deepcopy(base).to(dtype)
    add(model, "head", lora(2))
    model.head.adapter.float()
    x, path = torch.randn(3, 6, dtype=dtype), tmp_path / "task.safetensors"
    save_adapters(stir(model), path, "head")
    fresh = base.to(dtype)
    load_adapters(fresh, path)
    assert fresh.head.adapter.weight_a.dtype == torch.float32
    assert torch.equal(fresh.head(x), model.head(x))


def test_training_does_not_change_the_file(base, tuned, units, tmp_path):
    path = tmp_path / "task.safetensors"
    save_adapters(tuned, path, HEAD)
    before = path.read_bytes()
    load_adapters(base, path)
    base(units)[0].sum().backward()
    torch.optim.SGD(base.parameters(), lr=1.0).step()
    assert path.read_bytes() == before


def test_two_tasks_in_one_model(base, stir, units, tmp_path):
    first, second = copy.deepcopy(base), copy.deepcopy(base)
    add(first, "lstm", lora(2), "first")
    add(second, "lstm", lora(3), "second")
    save_adapters(stir(first, 1), tmp_path / "1")
    save_adapters(stir(second, 2), tmp_path / "2")
    load_adapters(base, tmp_path / "1")
    load_adapters(base, tmp_path / "2")
    assert torch.equal(base.lstm.first.weight_ih_l0_b, first.lstm.first.weight_ih_l0_b)
    assert torch.equal(base.lstm.second.weight_ih_l0_b, second.lstm.second.weight_ih_l0_b)


def untouched(model, state):
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_another_architecture(tuned, tmp_path):
    path = tmp_path / "task.safetensors"
    save_adapters(tuned, path, HEAD)
    deeper = Network()
    deeper.more = nn.Linear(2, 3)
    shallower = Network()
    del shallower.layers[1]
    unlike = Network()
    unlike.head = nn.Linear(6, 5)
    for model, message in [
        (Network(width=8), r"embedding.weight is \(11, 6\) there and \(11, 8\) in the model"),
        (Network(units=12), r"embedding.weight is \(11, 6\) there and \(12, 6\) in the model"),
        (unlike, r"head.bias is \(4,\) there and \(5,\) in the model"),
        (deeper, r"more.weight is absent there and \(3, 2\) in the model"),
        (shallower, r"an adapter for 'layers.1', and the model no module of that name"),
    ]:
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(UserError, match=message):
            load_adapters(model, path)
        untouched(model, state)
    with pytest.raises(UserError, match="something called 'adapter' already"):
        load_adapters(tuned, path)


def test_files_that_are_none(base, tuned, tmp_path):
    path, state = tmp_path / "task.safetensors", copy.deepcopy(base.state_dict())
    save_adapters(tuned, path, HEAD)
    data, metadata = path.read_bytes(), safetensors.safe_open(path, "pt").metadata()

    def written(**changes):
        meta = {**json.loads(metadata["glomo.adapters"]), **changes}
        safetensors.torch.save_file(safetensors.torch.load(data), path, {"glomo.adapters": json.dumps(meta)})

    def plain():
        safetensors.torch.save_file({"x": torch.zeros(2)}, path)

    entries = json.loads(metadata["glomo.adapters"])["adapters"]
    wider = [dict(entries[0], settings={**entries[0]["settings"], "r": 5}), *entries[1:]]
    for write, message in [
        (lambda: path.write_bytes(data[:-5]), "is cut, or no safetensors file"),
        (lambda: path.write_bytes(b"text"), "is cut, or no safetensors file"),
        (plain, "holds tensors and no adapters"),
        (lambda: written(format=2), "has format 2; this version reads 1"),
        (lambda: written(adapters=[dict(entries[0], kind="Other")]), "has a Other; this version knows Bottle"),
        (lambda: written(adapters=wider), r"weight_[ab] is \(.*2.*\) there and \(.*5.*\) in the model"),
        (path.unlink, "there is no file"),
    ]:
        write()
        with pytest.raises(UserError, match=message):
            load_adapters(base, path)
        untouched(base, state)


def test_what_cannot_be_saved(base, tmp_path):
    path = tmp_path / "task.safetensors"
    with pytest.raises(ValueError, match="the model has no adapters to save"):
        save_adapters(base, path)
    add(base, "head", lora(2))
    with pytest.raises(ValueError, match="the head's pattern 'heads' matches no name"):
        save_adapters(base, path, "heads")
    with pytest.raises(ValueError, match="no regular expression"):
        save_adapters(base, path, "(")
    merge(base)
    with pytest.raises(ValueError, match=r"'head.adapter' is merged; unmerge\(model\) first"):
        save_adapters(base, path)
    unmerge(base)

    class Own(ParallelAdapter):
        pass

    add(base, "lstm", lambda module, name: Own())
    with pytest.raises(ValueError, match=r"'lstm.adapter' is a Own; a file can hold BottleneckAdapter"):
        save_adapters(base, path)
    with pytest.raises(UserError, match="cannot write"):
        save_adapters(copy_with_lora(Network()), tmp_path / "no folder" / "x")
    assert list(tmp_path.iterdir()) == []


def copy_with_lora(model):
    add(model, "head", lora(2))
    return model
