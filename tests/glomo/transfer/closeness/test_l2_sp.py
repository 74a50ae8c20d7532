"""L2-SP against its formula in loops, its analytic gradient, and the mistakes of others."""

import numpy as np
import pytest
import torch
from torch import nn

from glomo.transfer.closeness import L2SP


class Encoder(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.norm = nn.LayerNorm((3, 4))
        self.batch_norm = nn.BatchNorm1d(3)
        self.lstm = nn.LSTM(4, 2)
        self.head = nn.Linear(2, classes)


def pair():
    source, model = Encoder().double(), Encoder().double()
    weights = {name: w for name, w in source.state_dict().items() if not name.startswith("head")}
    return model, weights


WEIGHTS = {"conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"}


def test_the_formula():
    model, source = pair()
    penalty = L2SP(model, source, alpha=0.3, beta=0.07)
    assert set(penalty.names) == WEIGHTS  # no bias, no normalisation
    expected = 0.0
    for name, parameter in model.named_parameters():
        w = parameter.detach().numpy()
        if name not in WEIGHTS:
            continue
        if name in source:
            expected += 0.3 / 2 * sum((a - b) ** 2 for a, b in zip(w.flat, source[name].numpy().flat, strict=True))
        else:
            expected += 0.07 / 2 * sum(a**2 for a in w.flat)
    np.testing.assert_allclose(penalty().item(), expected, rtol=1e-14)


def test_the_gradient():
    model, source = pair()
    L2SP(model, source, alpha=0.3, beta=0.07)().backward()
    for name, parameter in model.named_parameters():
        if name == "head.weight":
            torch.testing.assert_close(parameter.grad, 0.07 * parameter.detach())
        elif name in WEIGHTS:
            torch.testing.assert_close(parameter.grad, 0.3 * (parameter.detach() - source[name]))
        else:
            assert parameter.grad is None


def test_published_defaults():
    penalty = L2SP(nn.Linear(2, 2))
    assert (penalty.alpha, penalty.beta) == (0.1, 0.01)


def test_the_present_weights():
    model, _ = pair()
    penalty = L2SP(model)
    assert penalty() == 0
    with torch.no_grad():
        model.conv.weight[0, 0, 0] += 2
        model.conv.bias += 1
    torch.testing.assert_close(penalty(), torch.tensor(0.1 / 2 * 4, dtype=torch.float64))
    assert penalty().item() == pytest.approx(0.2)


def test_the_anchors_are_copies():
    model, source = pair()
    penalty = L2SP(model, source)
    before = penalty()
    for weight in source.values():
        weight.zero_()
    assert penalty() == before


def test_another_choice():
    model, source = pair()
    assert set(L2SP(model, source, on=lambda name, p: p.dim() == 1).names) == {
        "conv.bias",
        "batch_norm.weight",
        "batch_norm.bias",
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
        "head.bias",
    }


def test_a_tied_weight_under_its_other_name():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    penalty = L2SP(model, {"b.weight": torch.zeros(3, 3)}, alpha=1.0, beta=0.0)
    torch.testing.assert_close(penalty(), model["a"].weight.square().sum() / 2)


def test_which_weights_are_new_is_restored_without_the_source():
    model, source = pair()
    saved = L2SP(model, source)
    fresh = L2SP(model)
    assert fresh() == 0
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(), saved())
    assert fresh.new.tolist() == [name == "head.weight" for name in fresh.names]


def test_several_types_of_numbers():
    model = nn.Sequential(nn.Linear(2, 3).double(), nn.Linear(3, 2).bfloat16())
    penalty = L2SP(model, {"0.weight": torch.zeros(3, 2)}, 1.0, 1.0)
    expected = sum(float(model[n].weight.detach().double().square().sum()) for n in (0, 1)) / 2
    assert penalty().item() == pytest.approx(expected, rel=1e-6)


def test_another_architecture():
    model, _ = pair()
    with pytest.raises(ValueError, match=r"the model has conv.weight, .*, the source fc.weight; a state_dict"):
        L2SP(model, {"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="the source nothing;"):
        L2SP(model, {})
    with pytest.raises(ValueError, match=r"'head.weight' is \(3, 2\) in the model and \(10, 2\) in the source"):
        L2SP(model, Encoder(10).state_dict())
    with pytest.raises(TypeError, match=r"source is a Encoder; a state_dict is needed"):
        L2SP(model, Encoder())


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_wrong_factors(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; a finite number of at least 0"):
        L2SP(nn.Linear(2, 2), **{name: value})
