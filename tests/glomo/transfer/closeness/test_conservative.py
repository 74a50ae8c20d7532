"""Conservative training against numpy, and a source that stays as it was."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from glomo.transfer import layer_groups
from glomo.transfer.closeness import (
    ConservativeOutputs,
    ConservativeParameters,
    interpolated_targets,
    output_distance,
)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(o, o0, distance):
    """Row by row, in fp64."""
    total = 0.0
    for row, row0 in zip(o.reshape(-1, o.shape[-1]), o0.reshape(-1, o.shape[-1]), strict=True):
        p, p0 = softmax(row), softmax(row0)
        total += {
            "kl": sum(b * np.log(b / a) for a, b in zip(p, p0, strict=True)),
            "cross-entropy": -sum(b * np.log(a) for a, b in zip(p, p0, strict=True)),
            "squared": sum((a - b) ** 2 for a, b in zip(row, row0, strict=True)),
        }[distance]
    return total / (o.size // o.shape[-1])


DISTANCES = ["kl", "cross-entropy", "squared"]


@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (2, 3, 7)])
@pytest.mark.parametrize("distance", DISTANCES)
def test_distances(shape, distance):
    outputs, source = torch.randn(2, *shape, dtype=torch.float64)
    found = output_distance(outputs, source, distance)
    np.testing.assert_allclose(found.item(), oracle(outputs.numpy(), source.numpy(), distance), rtol=1e-12, atol=1e-15)


def test_gradients():
    """(softmax(o) - p0) / N and 2 (o - o0) / N; nothing for the source."""
    outputs, source = torch.randn(2, 5, 3, dtype=torch.float64)
    for distance, expected in (
        ("kl", (outputs.softmax(1) - source.softmax(1)) / 5),
        ("cross-entropy", (outputs.softmax(1) - source.softmax(1)) / 5),
        ("squared", 2 * (outputs - source) / 5),
    ):
        o, o0 = outputs.clone().requires_grad_(), source.clone().requires_grad_()
        output_distance(o, o0, distance).backward()
        torch.testing.assert_close(o.grad, expected)
        assert o0.grad is None


@pytest.mark.parametrize("distance", DISTANCES)
def test_masks(distance):
    outputs, source = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    found = output_distance(outputs.masked_fill(~mask[..., None], float("nan")), source, distance, mask)
    expected = oracle(outputs[mask].numpy(), source[mask].numpy(), distance)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert output_distance(outputs, source, distance, torch.zeros(3, 4).bool()) == 0
    assert output_distance(outputs[:0], source[:0], distance) == 0


@pytest.mark.parametrize("distance", ["kl", "cross-entropy"])
def test_a_class_that_is_never_predicted(distance):
    """-inf in both, as for padding: the value and the gradient are those without the class."""
    outputs, source = torch.randn(2, 4, 3, dtype=torch.float64)
    wide = torch.cat([torch.full((4, 1), -torch.inf), outputs], 1).requires_grad_()
    wide_source = torch.cat([torch.full((4, 1), -torch.inf), source], 1)
    loss = output_distance(wide, wide_source, distance)
    torch.testing.assert_close(loss, output_distance(outputs, source, distance))
    loss.backward()
    torch.testing.assert_close(wide.grad[:, 1:], (outputs.softmax(1) - source.softmax(1)) / 4)
    assert (wide.grad[:, 0] == 0).all()


def test_half_precision():
    outputs, source = torch.randn(2, 50, 9).bfloat16()
    found = output_distance(outputs, source)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(oracle(outputs.double().numpy(), source.double().numpy(), "kl"), rel=1e-5)


def test_parameters_of_chosen_groups():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
    groups = layer_groups(model, {"lower": "0|1", "head": "2"})
    penalty = ConservativeParameters(model, 0.7, groups[:1])
    assert set(penalty.names) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    change = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += change[name]
    expected = 0.7 * sum(float((change[name].numpy() ** 2).sum()) for name in penalty.names)
    assert penalty().item() == pytest.approx(expected, rel=1e-12)
    penalty().backward()
    torch.testing.assert_close(model[0].bias.grad, 2 * 0.7 * change["0.bias"])
    assert model[2].weight.grad is None
    assert len(ConservativeParameters(model, 1.0).names) == 6


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 3)

    def forward(self, x, scale=1.0):
        return self.head(self.body(x)) * scale


def test_the_source_is_frozen_and_in_evaluation_mode():
    model = Classifier()
    for _ in range(3):
        model(torch.randn(9, 4))  # statistics of BatchNorm
    keys = set(model.state_dict())
    penalty = ConservativeOutputs(model, 0.5)
    x = torch.randn(8, 4)
    expected = copy.deepcopy(model).eval()(x)
    state = {name: value.clone() for name, value in penalty.state_dict().items()}
    model.train()
    penalty.train()
    penalty.requires_grad_(True)  # even so
    optimizer = torch.optim.SGD([*model.parameters(), *penalty.parameters()], 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        penalty(model(x), x).backward()
        optimizer.step()
    assert set(model.state_dict()) == keys
    assert all(not module.training for module in penalty.source.modules())
    assert all(torch.equal(value, state[name]) for name, value in penalty.state_dict().items())
    assert torch.equal(penalty.source(x), expected)
    assert not penalty.source(x).requires_grad


def test_the_penalty_is_the_distance_times_the_strength():
    model, source = Classifier().eval(), Classifier().eval()
    x = torch.randn(5, 4)
    for distance in DISTANCES:
        penalty = ConservativeOutputs(source, 0.5, distance)
        expected = 0.5 * oracle(model(x).detach().double().numpy(), source(x).detach().double().numpy(), distance)
        assert penalty(model(x), x).item() == pytest.approx(expected, rel=1e-5)
        expected = 0.5 * oracle(model(x).detach().double().numpy(), source(x, 2.0).detach().double().numpy(), distance)
        assert penalty(model(x), x, scale=2.0).item() == pytest.approx(expected, rel=1e-5)


def test_save_load_and_copies():
    source, x = Classifier(), torch.randn(5, 4)
    penalty, outputs = ConservativeOutputs(source, 0.5), torch.randn(5, 3)
    fresh = ConservativeOutputs(Classifier(), 0.5)
    assert fresh(outputs, x) != penalty(outputs, x)
    fresh.load_state_dict(penalty.state_dict())
    assert torch.equal(fresh(outputs, x), penalty(outputs, x))
    assert torch.equal(copy.deepcopy(penalty)(outputs, x), penalty(outputs, x))
    penalty.double()
    torch.testing.assert_close(penalty(outputs.double(), x.double()).float(), fresh(outputs, x))


def test_interpolated_targets():
    """(1 - rho) (CE + lambda KL) and the cross-entropy of the targets have the same gradient."""
    logits, source = torch.randn(2, 6, 4, dtype=torch.float64)
    labels, rho = torch.tensor([0, 3, 1, 1, 2, 0]), 0.3
    targets = interpolated_targets(labels, source, rho)
    for n in range(6):
        expected = rho * softmax(source[n].numpy()) + (1 - rho) * np.eye(4)[labels[n]]
        np.testing.assert_allclose(targets[n].numpy(), expected, rtol=1e-12)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    cross_entropy(one, targets).backward()
    strength = rho / (1 - rho)
    ((1 - rho) * (cross_entropy(other, labels) + strength * output_distance(other, source))).backward()
    torch.testing.assert_close(one.grad, other.grad)
    assert torch.equal(interpolated_targets(labels, source, 0.0).argmax(1), labels)
    assert interpolated_targets(labels[:0], source[:0], 0.5).shape == (0, 4)
    assert not interpolated_targets(labels, source.requires_grad_(), 0.5).requires_grad


def test_the_loss_of_wiese():
    """L_task + C_l2 ||W - W_0||^2 + C_fc CE(p_0, p), written out."""
    source = nn.Linear(3, 2, bias=False).double()
    model = copy.deepcopy(source)
    parameters, outputs = ConservativeParameters(model, 0.2), ConservativeOutputs(source, 0.6, "cross-entropy")
    with torch.no_grad():
        model.weight += torch.randn(2, 3)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    found = cross_entropy(model(x), y) + parameters() + outputs(model(x), x)
    w, w0 = model.weight.detach().numpy(), source.weight.detach().numpy()
    p, p0 = softmax(x.numpy() @ w.T), softmax(x.numpy() @ w0.T)
    task = -np.mean([np.log(p[n, y[n]]) for n in range(4)])
    expected = task + 0.2 * ((w - w0) ** 2).sum() - 0.6 * np.mean((p0 * np.log(p)).sum(1))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_mistakes():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="strength is -1; a finite number of at least 0"):
        ConservativeParameters(model, -1)
    with pytest.raises(ValueError, match="strength is nan"):
        ConservativeOutputs(model, float("nan"))
    with pytest.raises(ValueError, match="distance is 'l1'; 'kl', 'cross-entropy' or 'squared'"):
        ConservativeOutputs(model, 1.0, "l1")
    with pytest.raises(ValueError, match="distance is 'l1'"):
        output_distance(torch.zeros(1, 2), torch.zeros(1, 2), "l1")
    with pytest.raises(ValueError, match=r"outputs are \(4, 5\) and the source's \(4, 2\)"):
        ConservativeOutputs(model, 1.0)(torch.zeros(4, 5), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"outputs are \(5,\) and the source's \(5,\)"):
        output_distance(torch.zeros(5), torch.zeros(5))
    with pytest.raises(ValueError, match=r"mask is torch.float32 of shape \(3,\); .* \(4,\) is needed"):
        output_distance(torch.zeros(4, 2), torch.zeros(4, 2), mask=torch.ones(3))
    with pytest.raises(TypeError, match="the model returns a tuple; a tensor of outputs"):
        ConservativeOutputs(nn.LSTM(3, 2), 1.0)(torch.zeros(4, 2), torch.zeros(4, 3))
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"the groups name '0\.weight', which the model lacks"):
        ConservativeParameters(model, 1.0, layer_groups(other, ["0"]))
    with pytest.raises(ValueError, match=r"rho is 1\.5; a number from 0 to 1"):
        interpolated_targets(torch.zeros(2).long(), torch.zeros(2, 3), 1.5)
    with pytest.raises(ValueError, match=r"labels are \(3,\) and the source's outputs \(2, 3\)"):
        interpolated_targets(torch.zeros(3).long(), torch.zeros(2, 3), 0.5)


@pytest.mark.parametrize("distance", ["kl", "cross-entropy", "squared"])
def test_what_does_not_count_may_be_anything(distance):
    outputs = torch.tensor([[1.0, 2.0], [math.nan, -math.inf]], requires_grad=True)
    before = torch.tensor([[0.5, 0.0], [math.inf, 0.0]])
    output_distance(outputs, before, distance, torch.tensor([True, False])).backward()
    assert outputs.grad[1].tolist() == [0.0, 0.0]
    assert outputs.grad[0].isfinite().all()


def test_a_class_that_both_rule_out_adds_nothing():
    outputs, before = torch.tensor([[1.0, -math.inf, 2.0]]), torch.tensor([[0.0, -math.inf, 2.0]])
    assert output_distance(outputs, before, "squared").item() == 1.0
