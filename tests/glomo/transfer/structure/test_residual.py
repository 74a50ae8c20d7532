"""Residual adapters of convolutions against their formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from glomo.nn import LanguageModel, TransformerConfig
from glomo.transfer.structure import (
    ParallelResidual,
    SerialResidual,
    add,
    merge,
    parallel_residual,
    serial_residual,
    unmerge,
)

CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]


@pytest.mark.parametrize("training", [True, False])
def test_the_serial_formula(training, stir):
    adapter = SerialResidual(3).double().train(training)
    stir(adapter)
    y = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    adapter.norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    adapter.norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
    mean = y.mean((0, 2, 3)) if training else adapter.norm.running_mean.clone()
    var = y.var((0, 2, 3), unbiased=False) if training else adapter.norm.running_var.clone()
    normal = (y - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    normal = normal * adapter.norm.weight[:, None, None] + adapter.norm.bias[:, None, None]
    expected = y.clone()
    for o in range(3):
        for i in range(3):
            expected[:, o] += adapter.weight[o, i, 0, 0] * normal[:, i]
    torch.testing.assert_close(adapter(y), expected)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_at_the_start_nothing_changes(kind):
    layer = kind(4, 6, 3, padding=1, stride=2, groups=2)
    x = torch.randn(2, 4, *[5] * len(layer.kernel_size))
    before = layer(x)
    add(layer, "", serial_residual(), "serial")
    add(layer, "", parallel_residual(), "parallel")
    assert torch.equal(layer(x), before)
    layer(x).square().sum().backward()
    assert layer.serial.weight.grad.any()
    assert layer.parallel.weight.grad.any()


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 5, "padding": 2, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 3},
        {"kernel_size": 1},
        {"kernel_size": 1, "padding": "valid", "stride": 2},
        {"kernel_size": 3, "padding": "same", "groups": 2},
        {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2, "padding_mode": "circular", "bias": False},
    ],
)
def test_the_parallel_formula_and_its_merge(kind, how, stir):
    layer = kind(4, 6, **how).double()
    x = torch.randn(2, 4, *[7] * len(layer.kernel_size), dtype=torch.float64)
    before = layer(x)
    add(layer, "", parallel_residual())
    stir(layer)
    sparse = x[(slice(None), slice(None), *(slice(None, None, s) for s in layer.stride))]
    a, groups = layer.adapter.weight.flatten(1), layer.groups
    beside = torch.zeros_like(before)
    for o in range(6):
        group = o // (6 // groups)
        for i in range(4 // groups):
            beside[:, o] += a[o, i] * sparse[:, group * (4 // groups) + i]
    torch.testing.assert_close(layer(x), before + beside)
    weight, original = layer.weight, layer.weight.detach().clone()
    merge(layer)
    torch.testing.assert_close(layer(x), before + beside, atol=1e-12, rtol=1e-12)
    changed = (layer.weight != original).flatten(2).any(0).any(0)
    assert changed.nonzero().tolist() == [[changed.numel() // 2]]  # the centre alone
    unmerge(layer)
    assert layer.weight is weight
    assert torch.equal(weight, original)
    twin = copy.deepcopy(layer)
    merge(twin, keep=False)
    assert list(twin.state_dict()) == [name for name in layer.state_dict() if "adapter" not in name]
    torch.testing.assert_close(twin(x), before + beside, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 6), nn.LSTM(4, 6, batch_first=True), nn.GRU(4, 3, bidirectional=True, batch_first=True)]
)
def test_beside_layers_of_features(layer, stir):
    """y + A x in the last dimension; beside a linear layer it goes into the weight, beside others it cannot."""
    layer, x = layer.double(), torch.randn(2, 5, 4, dtype=torch.float64)
    before = layer(x)
    add(layer, "", parallel_residual())
    after = layer(x)
    assert torch.equal(first(after), first(before))
    stir(layer)
    a, expected = layer.adapter.weight, first(before).clone()
    assert a.shape == (6, 4)
    for o in range(6):
        for i in range(4):
            expected[..., o] += a[o, i] * x[..., i]
    torch.testing.assert_close(first(layer(x)), expected)
    if isinstance(layer, nn.Linear):
        merge(layer, keep=False)
        assert set(layer.state_dict()) == {"weight", "bias"}
        torch.testing.assert_close(layer(x), expected)
    else:
        with pytest.raises(ValueError, match="no adapter that can be merged"):
            merge(layer)


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def test_beside_layers_of_a_transformer(stir):
    """A whole layer's width is known; the causal model stays causal, and padding changes nothing."""
    model = LanguageModel(TransformerConfig.preset("tiny", vocab_size=9, dim=12, ff=8, dropout=0.0)).double().eval()
    x = torch.randint(1, 9, (2, 6))
    embedded = model.layers(x)
    assert add(model, r"decoder\.layers\.\d", parallel_residual()) == ["decoder.layers.0", "decoder.layers.1"]
    stir(model)
    torch.testing.assert_close(model.layers(x)[1], embedded[1] + embedded[0] @ model.decoder.layers[0].adapter.weight.T)
    torch.testing.assert_close(model.hidden(x[:, :4]), model.hidden(x)[:, :4])


def test_gradients_of_the_parallel_one(stir):
    adapter = stir(ParallelResidual(2, 3, (2,)).double())
    x = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: F.conv1d(x, a, stride=2), (x, adapter.weight))
    assert torch.autograd.gradcheck(adapter, (x,))


def test_statistics_are_saved(stir):
    layer = nn.Conv2d(2, 3, 1)
    add(layer, "", serial_residual())
    stir(layer)
    for _ in range(3):
        layer(torch.randn(4, 2, 3, 3) * 5 + 2)
    other = nn.Conv2d(2, 3, 1)
    add(other, "", serial_residual())
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 2, 3, 3)
    assert torch.equal(layer.eval()(x), other.eval()(x))
    assert layer.adapter.norm.running_mean.any()


def test_mistakes():
    for how, message in [
        ({"kernel_size": 3}, r"kernel_size \(3, 3\) and padding \(0, 0\); .* padding \(1, 1\) for these"),
        ({"kernel_size": 2, "padding": 1}, r"kernel_size \(2, 2\) and padding \(1, 1\)"),
        ({"kernel_size": 4, "padding": "same"}, r"kernel_size \(4, 4\) and padding same; .* odd sizes"),
        ({"kernel_size": 3, "padding": "valid"}, r"kernel_size \(3, 3\) and padding \(0, 0\)"),
        ({"kernel_size": 3, "padding": 1, "dilation": 2}, r"padding \(2, 2\) for these"),
    ]:
        with pytest.raises(ValueError, match=message):
            parallel_residual()(nn.Conv2d(2, 2, **how), "layer")
    with pytest.raises(TypeError, match="'layer' is a Linear; a residual adapter needs a Conv1d, Conv2d or Conv3d"):
        serial_residual()(nn.Linear(2, 2), "layer")
    with pytest.raises(ValueError, match="there are 4 dimensions of space; 1 to 3 are possible"):
        SerialResidual(2, 4)
    with pytest.raises(ValueError, match="channels is 0"):
        SerialResidual(0)
    with pytest.raises(ValueError, match="'layer', a Embedding, reads ids"):
        parallel_residual()(nn.Embedding(3, 2), "layer")
    with pytest.raises(ValueError, match="'layer', a Identity, cannot be inferred"):
        parallel_residual()(nn.Identity(), "layer")
    assert parallel_residual(width=3)(nn.Identity(), "layer").weight.shape == (3, 3)
    with pytest.raises(ValueError, match="groups is 2, and there are no dimensions of space"):
        ParallelResidual(4, 4, (), groups=2)
    with pytest.raises(ValueError, match="inputs 3 and outputs 4 must be multiples of groups, which is 2"):
        ParallelResidual(3, 4, groups=2)
