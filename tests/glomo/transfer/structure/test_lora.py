"""LoRA against dense weights W + (alpha / r) B A, in fp64."""

import copy
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from glomo.nn import MultiheadAttention
from glomo.nn.awd_lstm import AWDLSTM, AWDLSTMConfig
from glomo.nn.recurrent_dropout import WeightDropLSTM
from glomo.transfer.structure import LinearLoRA, WeightLoRA, add, lora, remove
from glomo.transfer.structure.lora_weights import _for_cudnn

ALPHA, R = 3.0, 2
MATRICES = [
    lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True, proj_size=2),
    lambda: nn.LSTM(3, 4, bias=False),
    lambda: nn.GRU(3, 5, 2, bidirectional=True),
    lambda: nn.RNN(3, 4, nonlinearity="relu"),
    lambda: WeightDropLSTM(3, 4),
]


def dense(weight, a, b):
    """W + (alpha / r) B A, in numpy's loops."""
    flat = weight.detach().double().numpy().reshape(len(weight), -1).copy()
    a, b = (x.detach().double().numpy() for x in (a, b))
    for row, column in np.ndindex(flat.shape):
        flat[row, column] += ALPHA / R * sum(b[row, k] * a[k, column] for k in range(R))
    return torch.from_numpy(flat).view(weight.shape)


def without(model):
    """A copy without the adapter, whose weights are the dense ones."""
    plain = copy.deepcopy(model)
    for name in model.adapter.names:
        a, b = (getattr(model.adapter, f"{name.replace('.', '_')}_{x}") for x in "ab")
        plain.get_parameter(name).data.copy_(dense(model.get_parameter(name), a, b))
    remove(plain)
    return plain


def check_gradients(model, plain, loss):
    """dA = (alpha / r) B^T dW and dB = (alpha / r) dW A^T, with dW that of the dense weight."""
    loss(model).backward()
    loss(plain).backward()
    for name in model.adapter.names:
        a, b = (getattr(model.adapter, f"{name.replace('.', '_')}_{x}") for x in "ab")
        d = plain.get_parameter(name).grad.flatten(1)
        torch.testing.assert_close(a.grad, ALPHA / R * b.t() @ d)
        torch.testing.assert_close(b.grad, ALPHA / R * d @ a.t())
    others = [p for n, p in model.named_parameters() if not n.startswith("adapter")]
    for parameter, other in zip(others, plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def with_lora(module, stir, **settings):
    module = module.double()
    add(module, "", lora(R, ALPHA, **settings))
    return stir(module)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_linear(shape, stir):
    model = with_lora(nn.Linear(5, 4), stir)
    plain, x = without(model), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(model(x), plain(x))
    (dx,) = torch.autograd.grad(model(x).square().sum(), x)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    torch.testing.assert_close(dx, expected)
    check_gradients(model, plain, lambda m: m(x).square().sum())


def test_a_frozen_weight_gets_no_gradient_and_none_is_formed(stir):
    model = with_lora(nn.Linear(64, 48), stir)
    model.weight.requires_grad_(False)
    model.bias.requires_grad_(False)
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and func not in (torch.ops.aten.t.default, torch.ops.aten.view.default):
                shapes.append(tuple(result.shape))
            return result

    x = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)
    with Watch():
        model(x).sum().backward()
    assert model.weight.grad is None
    assert model.adapter.weight_a.grad is not None
    assert shapes
    assert not {(48, 64), (64, 48)} & set(shapes)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 2, "stride": 2, "bias": False},
        {"kernel_size": 3, "dilation": 2, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "groups": 4},
        {"kernel_size": 3, "padding": "same"},
    ],
)
def test_convolutions(kind, how, stir):
    model = with_lora(kind(4, 8, **how), stir)
    plain, space = without(model), len(model.kernel_size)
    x = torch.randn(2, 4, *[6] * space, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model(x[0]), plain(x[0]))
    check_gradients(model, plain, lambda m: m(x).square().sum())


@pytest.mark.parametrize("how", [{}, {"padding_idx": 0}, {"padding_idx": -1}])
def test_embeddings(how, stir):
    model = with_lora(nn.Embedding(7, 5, **how), stir)
    if how:
        model.adapter.weight_b.data[model.padding_idx] = 0  # as at the start
    plain, ids = without(model), torch.tensor([[0, 3, 3], [6, 1, 0]])
    torch.testing.assert_close(model(ids), plain(ids))
    weight = torch.randn(2, 3, 5, dtype=torch.float64)
    check_gradients(model, plain, lambda m: (m(ids) * weight).sum())
    if how:
        assert not model.adapter.weight_b.grad[model.padding_idx].any()


def test_gradients_by_frequency(stir):
    model = with_lora(nn.Embedding(7, 5, scale_grad_by_freq=True), stir)
    plain, ids = without(model), torch.tensor([[0, 3, 3], [3, 1, 0]])
    for one in (model, plain):
        one(ids).square().sum().backward()
    torch.testing.assert_close(model.adapter.weight_b.grad, ALPHA / R * plain.weight.grad @ model.adapter.weight_a.t())


@pytest.mark.parametrize("make", MATRICES)
def test_recurrent_layers(make, stir):
    model = with_lora(make(), stir)
    plain, x = without(model), torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x))
    assert len(model.adapter.names) == sum(p.dim() == 2 for p in plain.parameters())
    check_gradients(model, plain, lambda m: m(x)[0].square().sum())
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), plain.train(mode)(x))


def test_weight_drop(stir):
    """The sum of the weights is dropped out, as the weight is."""
    model = with_lora(WeightDropLSTM(3, 4, 0.5), stir)
    plain, x = without(model), torch.randn(2, 5, 3, dtype=torch.float64)
    found = []
    for one in (model, plain):
        torch.manual_seed(1)
        found.append(one.train()(x))
    torch.testing.assert_close(*found)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_an_awd_lstm(stir):
    encoder = AWDLSTM(AWDLSTMConfig.preset("tiny", vocab_size=20).scaled(0.0)).double()
    units = torch.randint(1, 20, (2, 4))
    before = encoder(units).raw
    assert add(encoder, r"embedding|layers\.\d", lora(R)) == ["embedding", "layers.0", "layers.1"]
    torch.testing.assert_close(encoder(units).raw, before)  # at the start nothing changes
    stir(encoder)
    encoder(units).raw.sum().backward()
    assert all(p.grad.any() for n, p in encoder.named_parameters() if "adapter" in n)


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, MultiheadAttention])
@pytest.mark.parametrize(
    "how", [{"batch_first": True}, {"kdim": 3, "vdim": 5}, {"bias": False}, {"add_bias_kv": True, "batch_first": True}]
)
def test_attention(kind, how, stir):
    model = with_lora(kind(4, 2, **how), stir)
    plain = without(model)
    query = torch.randn(3, 3, 4, dtype=torch.float64)
    key, value = (torch.randn(3, 3, how.get(n, 4), dtype=torch.float64) for n in ("kdim", "vdim"))
    alike = "kdim" not in how
    sources = (query, query) if alike else (key, value)
    assert len(model.adapter.names) == (2 if alike else 4)
    torch.testing.assert_close(model(query, *sources), plain(query, *sources))
    check_gradients(model, plain, lambda m: m(query, *sources)[0].square().sum())
    with torch.no_grad():  # PyTorch's fused path
        torch.testing.assert_close(model.eval()(query, *sources), plain.eval()(query, *sources))


@pytest.mark.parametrize("make", [*MATRICES, lambda: nn.MultiheadAttention(3, 1)])
def test_no_graph_is_kept(make, stir, monkeypatch):
    sums, plain_sum = [], WeightLoRA._sum

    def watched(*args):
        result = plain_sum(*args)
        sums.append(weakref.ref(result))
        return result

    monkeypatch.setattr(WeightLoRA, "_sum", watched)
    model = with_lora(make(), stir)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    call = (lambda: model(x, x, x)) if isinstance(model, nn.MultiheadAttention) else (lambda: model(x))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result = call()[0]
    result.sum().backward()
    expected = result.detach().clone()
    del result
    assert sums
    assert all(one() is None for one in sums)
    model = copy.deepcopy(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(call()[0], expected)


@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 4), lambda: nn.MultiheadAttention(4, 2)])
def test_a_call_that_fails_leaves_nothing(make, stir):
    model = with_lora(make(), stir)
    wrong = [torch.zeros(2, 2, 9, dtype=torch.float64)] * (3 if isinstance(model, nn.MultiheadAttention) else 1)
    right = [x[..., :4] if len(wrong) == 3 else x[..., :3] for x in wrong]
    before = model(*right)[0]
    with pytest.raises((RuntimeError, AssertionError)):
        model(*wrong)
    assert not any(type(value) is torch.Tensor for module in model.modules() for value in vars(module).values())
    assert torch.equal(model(*right)[0], before)
    copy.deepcopy(model)


@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 4), lambda: nn.MultiheadAttention(3, 1)])
def test_a_call_that_is_interrupted_counts_once(make, stir):
    """PyTorch runs no hook after an interrupt."""
    model, x = with_lora(make(), stir), torch.randn(2, 5, 3, dtype=torch.float64)
    call = (lambda: model(x, x, x)) if isinstance(model, nn.MultiheadAttention) else (lambda: model(x))
    before, state = call()[0], {name: value.clone() for name, value in model.state_dict().items()}

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        call()
    handle.remove()
    assert torch.equal(call()[0], before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    copy.deepcopy(model)


def test_weights_by_name(stir):
    model = with_lora(nn.MultiheadAttention(4, 2), stir, weights=["in_proj_weight"])
    plain, x = without(model), torch.randn(3, 1, 4, dtype=torch.float64)
    assert model.adapter.names == ("in_proj_weight",)
    torch.testing.assert_close(model(x, x, x), plain(x, x, x))
    odd = with_lora(nn.Bilinear(3, 4, 2), stir, weights=["weight"])
    plain, y = without(odd), [torch.randn(5, n, dtype=torch.float64) for n in (3, 4)]
    torch.testing.assert_close(odd(*y), plain(*y))


def test_tied_weights(stir):
    net = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "decoder": nn.Linear(4, 7, bias=False)})
    net["decoder"].weight = net["embedding"].weight
    units, x = torch.arange(7), torch.randn(3, 4)
    looked_up, logits = net["embedding"](units), net["decoder"](x)
    add(net, "decoder", lora(R))
    stir(net)
    assert torch.equal(net["embedding"](units), looked_up)
    assert not torch.allclose(net["decoder"](x), logits)
    remove(net)
    add(net, "embedding", lora(R))
    stir(net)
    assert torch.equal(net["decoder"](x), logits)
    assert not torch.allclose(net["embedding"](units), looked_up)


@pytest.mark.parametrize("module", [nn.Linear(5, 4), nn.Conv2d(2, 3, 3), nn.Embedding(5, 4), nn.LSTM(5, 4)])
def test_the_start(module):
    plain = copy.deepcopy(module)
    add(module, "", lora())
    settings = module.adapter.settings
    assert (settings["r"], settings["alpha"], settings["dropout"]) == (8, 8.0, 0.0)
    assert module.adapter.scale == 1.0
    for name in module.adapter.names:
        a, b = (getattr(module.adapter, f"{name}_{x}") for x in "ab")
        columns = module.get_parameter(name)[0].numel()
        assert a.shape == (8, columns)
        assert b.shape == (len(module.get_parameter(name)), 8)
        assert not b.any()
        assert a.abs().max() <= columns**-0.5
        assert a.std().item() == pytest.approx(columns**-0.5 / math.sqrt(3), rel=0.35)
    x = {"Embedding": torch.arange(5), "Conv2d": torch.randn(1, 2, 4, 4)}.get(type(module).__name__, torch.randn(3, 5))
    first = lambda y: y[0] if isinstance(y, tuple) else y
    assert torch.equal(first(module(x)), first(plain(x)))


def test_dropout_is_of_what_a_reads(stir):
    model = with_lora(nn.Linear(1000, 1), stir, dropout=0.4)
    plain, x = without(model), torch.ones(1, 1000, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), plain(x))
    model.train()
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    mask = F.dropout(x, 0.4)
    low = mask @ model.adapter.weight_a.t()
    torch.testing.assert_close(found, F.linear(x, model.weight, model.bias) + 1.5 * low @ model.adapter.weight_b.t())


def test_weights_in_one_piece_for_cudnn():
    layer = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    pieces = _for_cudnn(list(layer._flat_weights))
    assert all(torch.equal(a, b) for a, b in zip(pieces, layer._flat_weights, strict=True))
    assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1
    ends = [
        max(p.storage_offset() for p in pieces if p.dim() == 2),
        min(p.storage_offset() for p in pieces if p.dim() == 1),
    ]
    assert ends[0] < ends[1]
    sum(piece.sum() for piece in pieces).backward()
    assert all(parameter.grad.eq(1).all() for parameter in layer.parameters())


def test_the_generator():
    state = torch.get_rng_state()
    a, b, c = (LinearLoRA({"weight": [3, 4]}, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.weight_a, b.weight_a)
    assert not torch.equal(a.weight_a, c.weight_a)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.Conv1d(6, 5, 3), lambda: nn.LSTM(6, 5)])
def test_fp32_beside_bf16(make, stir):
    """Adapters may be kept in fp32 beside a base in bf16."""
    model = make().bfloat16()
    add(model, "", lora(R, ALPHA))
    model.adapter.float()
    stir(model, std=0.1)
    x = torch.randn(6, 6) if isinstance(model, (nn.Conv1d, nn.LSTM)) else torch.randn(2, 6)
    first = lambda y: y[0] if isinstance(y, tuple) else y
    found = first(model(x.bfloat16()))
    assert found.dtype == torch.bfloat16
    expected = first(without(model).float()(x.bfloat16().float()))
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
    found.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.adapter.parameters())


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.MultiheadAttention(6, 2)])
def test_autocast(make, stir):
    model = make()
    add(model, "", lora(R, ALPHA))
    stir(model, std=0.1)
    plain, x = without(model).float(), torch.randn(3, 2, 6)
    call = lambda m: m(x, x, x)[0] if isinstance(m, nn.MultiheadAttention) else m(x)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = call(model), call(plain)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)
    found.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.adapter.parameters())


def test_functional_calls(stir):
    """Weights that are given for one call count, as for gradients of single examples."""
    for model in (with_lora(nn.Linear(3, 4), stir), with_lora(nn.GRU(3, 4), stir)):
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        twin = stir(copy.deepcopy(model), seed=7)
        for parameter in twin.parameters():
            parameter.data += 0.1
        found = torch.func.functional_call(model, dict(twin.named_parameters()), x)
        torch.testing.assert_close(found, twin(x))


def test_mistakes():
    with pytest.raises(TypeError, match=r"'norm' is a LayerNorm; LoRA knows Linear, .* name the weights="):
        lora()(nn.LayerNorm(3), "norm")
    with pytest.raises(ValueError, match=r"'bias' of 'layer' has shape \(3,\); a parameter of at least two dimensions"):
        lora(weights=["bias"])(nn.Linear(2, 3), "layer")
    with pytest.raises(ValueError, match="'v' of 'layer' is none of its parameters"):
        lora(weights=["v"])(nn.Linear(2, 3), "layer")
    with pytest.raises(ValueError, match="r is 0; at least 1 is needed"):
        lora(0)(nn.Linear(2, 3), "layer")
    with pytest.raises(ValueError, match=r"dropout is 1.0; a probability from 0 to below 1"):
        lora(dropout=1.0)(nn.Linear(2, 3), "layer")
    with pytest.raises(ValueError, match=r"dropout is 0.1, but for weight_ih_l0, weight_hh_l0 .* 0 is needed"):
        lora(dropout=0.1)(nn.LSTM(2, 3), "layer")
    with pytest.raises(ValueError, match=r"dropout is 0.1, but 'units' reads ids; 0 is needed"):
        lora(dropout=0.1)(nn.Embedding(2, 3), "units")
    with pytest.raises(ValueError, match=r"'units' has max_norm 1.0, which changes its weight; None is needed"):
        lora()(nn.Embedding(2, 3, max_norm=1.0), "units")
    with pytest.raises(ValueError, match=r"dropout is 0.5"):
        WeightLoRA({"w": [2, 3]}, dropout=0.5)
