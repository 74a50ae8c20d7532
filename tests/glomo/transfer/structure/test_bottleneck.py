"""Bottleneck adapters against their formula."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from glomo.nn import MultiheadAttention
from glomo.transfer.structure import BottleneckAdapter, ParallelBottleneck, add, bottleneck, parallel_bottleneck
from glomo.transfer.structure.widths import features

FUNCTIONS = {
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


def narrow(x, down, up, function):
    """W_up act(W_down x + b) + b' of one vector, in loops; weights (matrix, vector)."""
    inner = [function(sum(down[0][i, j] * x[j] for j in range(len(x))) + down[1][i]) for i in range(down[0].shape[0])]
    return np.array([
        sum(up[0][i, j] * inner[j] for j in range(len(inner))) + up[1][i] for i in range(up[0].shape[0])
    ])  # fmt: skip


def weights(linear):
    weight = linear.weight.detach().numpy()
    return weight, np.zeros(len(weight)) if linear.bias is None else linear.bias.detach().numpy()


@pytest.mark.parametrize("activation", list(FUNCTIONS))
def test_the_serial_formula(activation, stir):
    adapter = stir(BottleneckAdapter(5, 3, activation).double())
    h = torch.randn(2, 3, 5, dtype=torch.float64)
    found = adapter(h).detach().numpy()
    for place in np.ndindex(2, 3):
        one = h[place].numpy()
        expected = one + narrow(one, weights(adapter.down), weights(adapter.up), FUNCTIONS[activation])
        np.testing.assert_allclose(found[place], expected, rtol=1e-12)


@pytest.mark.parametrize("activation", list(FUNCTIONS))
def test_the_parallel_formula(activation, stir):
    adapter = stir(ParallelBottleneck(4, 5, 3, activation, scale=2.5).double())
    x = torch.randn(2, 4, dtype=torch.float64)
    found = adapter(x).detach().numpy()
    for place in range(2):
        expected = 2.5 * narrow(x[place].numpy(), weights(adapter.down), weights(adapter.up), FUNCTIONS[activation])
        np.testing.assert_allclose(found[place], expected, rtol=1e-12)


def test_published_defaults():
    adapter = bottleneck()(nn.Linear(300, 400), "")
    assert adapter.settings == {"width": 400, "size": 64, "activation": "gelu", "std": 1e-3, "dim": -1}
    for linear in (adapter.down, adapter.up):
        assert linear.weight.abs().max() <= 2e-3  # cut at two standard deviations
        assert linear.weight.std().item() == pytest.approx(0.88e-3, rel=0.03)  # of a normal that is cut there
        assert not linear.bias.any()
    h = torch.randn(7, 400)
    assert (adapter(h) - h).abs().max() < 1e-3  # near the identity
    beside = parallel_bottleneck()(nn.Linear(300, 400), "")
    assert beside.settings == {
        "inputs": 300, "outputs": 400, "size": 64, "activation": "relu", "scale": 4.0, "dim": -1,
    }  # fmt: skip
    assert not beside(torch.randn(7, 300)).any()  # nothing at the start
    assert beside.down.weight.abs().max() <= 300**-0.5
    assert beside.down.weight.std().item() == pytest.approx((300**-0.5) / 3**0.5, rel=0.03)


def test_beside_a_layer_at_the_start_nothing_changes():
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    before = layer(x)
    add(layer, "", parallel_bottleneck(16))
    assert torch.equal(layer(x), before)
    layer(x).sum().backward()
    assert layer.adapter.up.weight.grad.any()


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(3, 5), (2, 3), (3, 5, -1)),
        (nn.Conv1d(3, 5, 1), (2, 3, 4), (3, 5, -2)),
        (nn.Conv2d(3, 5, 1), (2, 3, 4, 4), (3, 5, -3)),
        (nn.Conv3d(3, 5, 1), (3, 2, 2, 2), (3, 5, -4)),  # without a batch
        (nn.Embedding(3, 5), None, (None, 5, -1)),
        (nn.GRU(3, 5), (2, 3), (3, 5, -1)),
        (nn.RNN(3, 5, bidirectional=True), (2, 1, 3), (3, 10, -1)),
        (nn.LSTM(3, 5, proj_size=2), (2, 1, 3), (3, 2, -1)),
        (nn.LSTM(3, 5, 2, bidirectional=True, proj_size=4), (2, 1, 3), (3, 8, -1)),
        (nn.LayerNorm(3), (2, 3), (3, 3, -1)),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=3), None, (4, 4, -1)),
        (MultiheadAttention(4, 2), None, (4, 4, -1)),
    ],
)
def test_widths_are_inferred(module, shape, expected):
    assert features(module, "x") == expected
    add(module, "", bottleneck(2))
    module.adapter.double()
    module.double()
    if shape is not None:
        result = module(torch.randn(shape, dtype=torch.float64))
        result = result[0] if isinstance(result, tuple) else result
        assert result.size(expected[2]) == expected[1]


def test_channels_are_features_of_their_places(stir):
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    before = layer(x)
    add(layer, "", bottleneck(4))
    stir(layer)
    expected = layer.adapter.__class__(3, 4).double()
    expected.load_state_dict(layer.adapter.state_dict())
    torch.testing.assert_close(layer(x), expected(before.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_given_widths():
    block = nn.Conv2d(3, 3, 1)

    class Block(nn.Module):
        def forward(self, x):
            return x

    add(net := Block(), "", bottleneck(2, width=3, dim=1))
    assert net(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"an adapter of width 3 in dimension 1 was given \(2, 4, 3\)"):
        net(torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match="the width of 'norm', a LayerNorm, cannot be inferred"):
        bottleneck()(nn.LayerNorm((3, 4)), "norm")
    with pytest.raises(ValueError, match="'units', a Embedding, reads ids; a parallel adapter needs features"):
        parallel_bottleneck()(nn.Embedding(3, 4), "units")
    with pytest.raises(ValueError, match=r"'block' is a Conv2d, .*parallel_residual\(\) goes beside a convolution"):
        parallel_bottleneck()(block, "block")


def test_weights_are_drawn_from_the_generator():
    state = torch.get_rng_state()
    make = [lambda g=seed: BottleneckAdapter(5, generator=torch.Generator().manual_seed(g)) for seed in (1, 1, 2)]
    a, b, c = (one() for one in make)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.down.weight, b.down.weight)
    assert not torch.equal(a.down.weight, c.down.weight)
    ParallelBottleneck(5, 5, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_no_rows():
    assert BottleneckAdapter(3, 1)(torch.zeros(0, 3)).shape == (0, 3)
    assert ParallelBottleneck(3, 2, 1)(torch.zeros(2, 0, 3)).shape == (2, 0, 2)


def test_mistakes():
    with pytest.raises(ValueError, match="size is 0; at least 1 is needed"):
        BottleneckAdapter(3, 0)
    with pytest.raises(ValueError, match="inputs is -1; at least 1 is needed"):
        ParallelBottleneck(-1, 2)
    with pytest.raises(ValueError, match="activation is 'elu'; it must be one of gelu, relu, silu, tanh"):
        BottleneckAdapter(3, activation="elu")
