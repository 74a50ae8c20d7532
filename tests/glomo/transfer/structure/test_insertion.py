"""Adapters in any module: what they change, and that they leave without a trace."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from glomo.nn import MultiheadAttention
from glomo.transfer import freeze_all_but_top, layer_groups, optimizer_groups
from glomo.transfer.structure import (
    Adapter,
    ParallelAdapter,
    SerialAdapter,
    adapter_patterns,
    add,
    bottleneck,
    lora,
    parallel_residual,
    remove,
    serial_residual,
)

PLACES = "embedding|lstm|attention|convolution"


class Times(SerialAdapter):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, output):
        return output * self.factor


class Input(ParallelAdapter):
    def forward(self, x):
        return x


def times(factor):
    return lambda module, name: Times(factor)


def trained(model, units, steps, optimizer):
    for _ in range(steps):
        optimizer.zero_grad()
        model(units).square().sum().backward()
        optimizer.step()


def test_what_is_read_and_what_is_changed():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    y = net["a"](x)
    assert add(net, "a", times(3.0)) == ["a"]
    torch.testing.assert_close(net["a"](x), 3 * y)
    add(net, "a", lambda module, name: Input(), name="beside")
    torch.testing.assert_close(net["a"](x), 3 * y + x)
    torch.testing.assert_close(net["a"](input=x), 3 * y + x)
    add(net, "a", times(2.0), name="last")  # in their order
    torch.testing.assert_close(net["a"](x), 2 * (3 * y + x))
    remove(net, "adapter")
    torch.testing.assert_close(net["a"](x), 2 * (y + x))
    remove(net)
    assert torch.equal(net["a"](x), y)
    assert not net["a"]._forward_hooks


def test_where_matches_whole_names():
    net = nn.ModuleDict({"block": nn.ModuleDict({"query": nn.Linear(2, 2), "query2": nn.Linear(2, 2)})})
    assert add(net, r".*\.query", times(1.0)) == ["block.query"]
    assert add(net, r"block\.query\d", times(1.0)) == ["block.query2"]
    seen = []
    make = lambda module, name: seen.append(name) or Times(1.0)
    assert add(net, r".*query.*", make, "second") == seen == ["block.query", "block.query2"]  # none in an adapter
    alone = nn.Linear(2, 2)
    assert add(alone, "", times(5.0)) == [""]
    x = torch.randn(1, 2)
    torch.testing.assert_close(alone(x), 5 * nn.functional.linear(x, alone.weight, alone.bias))


def test_a_module_of_two_names_gets_one_adapter():
    shared = nn.Linear(2, 2)
    net = nn.ModuleDict({"a": shared, "b": shared})
    assert add(net, "b", times(1.0)) == ["b"]
    remove(net)
    assert add(net, "a|b", times(1.0)) == ["a"]


def test_outputs_that_are_tuples(reader, units):
    x = reader.embedding(units)
    out, (h, c) = reader.lstm(x)
    mixed, weights = reader.attention(out, out, out)
    add(reader, "lstm|attention", times(2.0))
    out2, (h2, c2) = reader.lstm(x)
    torch.testing.assert_close(out2, 2 * out)
    assert torch.equal(h, h2)
    assert torch.equal(c, c2)
    mixed2, weights2 = reader.attention(out, out, out)
    torch.testing.assert_close(mixed2, 2 * mixed)
    assert torch.equal(weights, weights2)


def test_packed_sequences(reader):
    x, lengths = torch.randn(2, 4, 6, dtype=torch.float64), torch.tensor([4, 2])
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    before, _ = pad_packed_sequence(reader.lstm(packed)[0], batch_first=True)
    add(reader, "lstm", times(2.0))
    add(reader, "lstm", lambda module, name: Input(), "beside")  # as wide as its output
    after, _ = pad_packed_sequence(reader.lstm(packed)[0], batch_first=True)
    valid = (torch.arange(4) < lengths[:, None])[..., None]
    torch.testing.assert_close(after, 2 * before + x * valid)


@pytest.mark.parametrize("make", [bottleneck(3), lora(2)], ids=["bottleneck", "lora"])
def test_nothing_of_it_is_left(reader, units, stir, make):
    before, state, modes = reader(units), copy.deepcopy(reader.state_dict()), reader.training
    hooks = [dict(module._forward_hooks) for module in reader.modules()]
    classes = [type(module) for module in reader.modules()]
    attributes = [set(vars(module)) for module in reader.modules()]
    add(reader, PLACES, make)
    stir(reader)
    names = list(reader.state_dict())
    assert [name for name in names if ".adapter." not in name] == list(state)
    assert not torch.allclose(reader(units), before)
    reader(units).sum().backward()
    remove(reader)
    assert torch.equal(reader(units), before)
    assert list(reader.state_dict()) == list(state)
    assert [dict(module._forward_hooks) for module in reader.modules()] == hooks
    assert [type(module) for module in reader.modules()] == classes
    assert [set(vars(module)) for module in reader.modules()] == attributes
    assert reader.training == modes


@pytest.mark.parametrize("make", [bottleneck(3), lora(2)], ids=["bottleneck", "lora"])
def test_copies_and_state_dicts(reader, units, stir, make):
    base = copy.deepcopy(reader)
    add(reader, PLACES, make)
    stir(reader)
    after = reader(units)
    after.sum().backward()
    twin = copy.deepcopy(reader)
    assert torch.equal(twin(units), after)
    stir(reader, seed=5)
    assert torch.equal(twin(units), after)  # with adapters of its own
    remove(reader)
    assert torch.equal(twin(units), after)
    add(base, PLACES, make)
    base.load_state_dict(twin.state_dict())
    assert torch.equal(base(units), after)


def test_weights_through_a_file(reader, units, stir, tmp_path):
    base = copy.deepcopy(reader)
    add(reader, PLACES, lora(2))
    after = stir(reader)(units)
    after.sum().backward()
    torch.save(reader.state_dict(), tmp_path / "weights.pt")
    add(base, PLACES, lora(2))
    base.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(base(units), after)


def test_restored_training_goes_on_to_the_same_bits(reader, units):
    def ready(model):
        add(model, PLACES, lora(2, generator=torch.Generator().manual_seed(3)))
        add(model, "convolution", serial_residual(), "serial")
        add(model, "convolution", parallel_residual(), "parallel")
        groups = layer_groups(model, adapter_patterns(model, "head"))
        optimizer = torch.optim.AdamW(optimizer_groups(groups, 1e-2))
        next(iter(freeze_all_but_top(groups, 10, 1e-2, count=2))).begin(model, groups, optimizer)
        return model, optimizer

    fresh = copy.deepcopy(reader)
    model, optimizer = ready(reader)
    trained(model, units, 2, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    trained(model, units, 3, optimizer)
    other, optimizer = ready(fresh)
    other.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    trained(other, units, 3, optimizer)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_device_and_mode_are_the_modules(dtype):
    layer = nn.Linear(4, 4).to(dtype).eval()
    add(layer, "", bottleneck(2))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert not layer.adapter.training
    assert layer(torch.randn(3, 4, dtype=dtype)).dtype == dtype
    with torch.device("meta"):
        layer = nn.Linear(4, 4)
    add(layer, "", lora())
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_groups_for_staged_training(reader, units):
    add(reader, "embedding|lstm", lora(2))
    add(reader, "head", bottleneck(2))
    patterns = adapter_patterns(reader, head="head", also="norm")
    groups = layer_groups(reader, patterns)
    base, learned, head = (set(group.parameters) for group in groups)
    assert [group.name for group in groups] == ["base", "adapters", "head"]
    assert head == {"head.weight", "head.bias"}
    assert learned == {n for n, _ in reader.named_parameters() if ".adapter." in n} | {"norm.weight", "norm.bias"}
    optimizer = torch.optim.AdamW(optimizer_groups(groups, 1e-2, weight_decay=0.1))
    before = copy.deepcopy(reader.state_dict())
    for stage in freeze_all_but_top(groups, steps=2, lr=1e-2, count=2):
        stage.begin(reader, groups, optimizer)
        trained(reader, units, 2, optimizer)
    moved = {name for name, value in reader.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == learned | head
    assert all(p.grad is None for name, p in reader.named_parameters() if name in base)


def test_groups_without_a_head(reader):
    add(reader, "lstm", lora(2))
    assert [group.name for group in layer_groups(reader, adapter_patterns(reader))] == ["base", "adapters"]


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize(
    ("where", "make"),
    [
        (r"layers\.1\.linear1", lora(2)),
        (r"layers\.\d\.linear2", bottleneck(3)),
        (r"layers\.\d\.self_attn", lora(2)),
        (r"layers\.1\.self_attn", bottleneck(3)),
        (r"layers\.0\.norm2", bottleneck(3)),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("gradients", [False, True])
def test_the_fused_encoder_of_pytorch_does_not_go_past_adapters(where, make, gradients, stir):
    net, x = encoder().requires_grad_(False), torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([5, 3, 1])[:, None]
    net.eval()
    with torch.no_grad():
        base = net(x, src_key_padding_mask=padding)
    add(net, where, make)
    stir(net)
    with torch.no_grad():
        expected = net.train()(x, src_key_padding_mask=padding)
    with torch.set_grad_enabled(gradients):
        found = net.eval()(x, src_key_padding_mask=padding)
    valid = ~padding
    torch.testing.assert_close(found[valid], expected[valid])
    assert not torch.allclose(found[valid], base[valid], atol=1e-2)
    assert found.requires_grad == gradients
    remove(net)
    with torch.no_grad():  # the fused path is back: it makes zeros of padding
        assert torch.equal(net(x, src_key_padding_mask=padding), base)


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, MultiheadAttention])
def test_the_projection_of_an_attention_is_never_called(kind):
    net = nn.ModuleDict({"attention": kind(4, 2)})
    with pytest.raises(ValueError, match=r"'attention.out_proj' is never called, .*; name 'attention'"):
        add(net, r".*out_proj", bottleneck())


def test_mistakes_leave_the_model_as_it_was():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ReLU(), "c": nn.Sequential(nn.Linear(2, 2))})
    state = list(net.state_dict())
    for where, make, name, error, message in [
        ("nothing", bottleneck(), "x", ValueError, "where is 'nothing', and no module is called so; there are a, b, c"),
        ("(", bottleneck(), "x", ValueError, "no regular expression"),
        ("a|b", bottleneck(), "x", ValueError, "the width of 'b', a ReLU, cannot be inferred; give width="),
        ("a", bottleneck(), "weight", ValueError, "'a', a Linear, has something called 'weight' already"),
        ("a", bottleneck(), "x.y", ValueError, "name is 'x.y'; one without dots is needed"),
        ("a", lambda module, name: nn.Linear(2, 2), "x", TypeError, "make returned Linear for 'a'"),
        ("c", bottleneck(width=2), "x", ValueError, "would call the adapter as one of its own layers"),
        ("", bottleneck(width=2), "x", ValueError, "'', a ModuleDict, is never called"),
    ]:
        with pytest.raises(error, match=message):
            add(net, where, make, name)
        assert list(net.state_dict()) == state
        assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(ValueError, match="there is no adapter; there are none"):
        remove(net)
    with pytest.raises(ValueError, match="the model has no adapters"):
        adapter_patterns(net)
    add(net, "a", bottleneck())
    with pytest.raises(ValueError, match="'a', a Linear, has an adapter called 'adapter' already"):
        add(net, "a", bottleneck())
    with pytest.raises(ValueError, match=r"there is no adapter called 'x'; there are a\.adapter"):
        remove(net, "x")
    with pytest.raises(ValueError, match=r"the pattern '\(c\)' has brackets that make groups; write \(\?:\.\.\.\)"):
        adapter_patterns(net, head="(c)")
    with pytest.raises(ValueError, match=r"'\[' is no regular expression"):
        adapter_patterns(net, also=["["])


def test_outputs_without_a_tensor():
    class Odd(nn.Module):
        def forward(self, x):
            return {"x": x}

    net = Odd()
    add(net, "", bottleneck(width=2))
    with pytest.raises(TypeError, match="an adapter's module returned dict"):
        net(torch.zeros(1, 2))


def test_an_adapter_must_say_what_it_does():
    layer = nn.Linear(2, 2)
    add(layer, "", lambda module, name: Adapter())
    with pytest.raises(NotImplementedError, match="Adapter does not say"):
        layer(torch.zeros(1, 2))


def test_compiled(reader, units, stir):
    net = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    add(net, "0|1", lora(2))
    add(net, "2", bottleneck(3))
    stir(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(units), net(units))
    grads = [
        torch.autograd.grad(model(units).square().sum(), [p for n, p in net.named_parameters() if "adapter" in n])
        for model in (compiled, net)
    ]
    torch.testing.assert_close(*grads)
    add(reader, "lstm|attention", lora(2))
    stir(reader)
    whole = torch.compile(reader, backend="eager")
    torch.testing.assert_close(whole(units), reader(units))
    torch.testing.assert_close(whole(units), reader(units))
