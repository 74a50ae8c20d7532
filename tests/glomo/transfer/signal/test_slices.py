"""Slice-based learning against its formulas, example by example, in plain Python."""

import copy
import math

import pytest
import torch
from torch import nn

from glomo.transfer.signal import SliceHeads, slice_members

LABELS = torch.tensor([0, 2, 1, 1, 0])
# overlapping (rows 1 and 3 are in two), and one empty
MEMBERS = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]]).bool()


def heads(slices=("short", "question", "empty"), dtype=torch.float64):
    torch.manual_seed(0)
    found = SliceHeads(nn.Linear(4, 3), 4, slices).to(dtype)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(3.0)
    return found


def features(dtype=torch.float64):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def linear(module, x):
    rows = zip(module.weight.tolist(), module.bias.tolist(), strict=True)
    return [sum(w * value for w, value in zip(row, x, strict=True)) + b for row, b in rows]


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def expected(model, x):
    """For one example: logits, predictions of all experts (the first is the base), probabilities of membership."""
    experts = [x, *(linear(expert, x) for expert in model.experts)]
    predictions = [linear(model.predictor, expert) for expert in experts]
    member = [1 / (1 + math.exp(-q)) for q in linear(model.indicators, x)]
    scores = [q * max(softmax(p)) for q, p in zip([1.0, *member], predictions, strict=True)]
    weights = softmax(scores)
    mixed = [sum(a * r[d] for a, r in zip(weights, experts, strict=True)) for d in range(4)]
    return linear(model.head, mixed), predictions, member


def test_the_mixture():
    model, x = heads(), features()
    with torch.no_grad():
        model.predictor.weight.add_(1.0).mul_(torch.tensor([1.0, -1.0, 2.0]).double()[:, None])  # not the head any more
    found = model(x)
    for row, logits in zip(x.tolist(), found.tolist(), strict=True):
        assert logits == pytest.approx(expected(model, row)[0], rel=1e-10)


def test_the_loss():
    model, x = heads(), features()
    per_slice: list[list[float]] = [[] for _ in range(4)]
    base, indicators = 0.0, 0.0
    for row, label, members in zip(x.tolist(), LABELS.tolist(), MEMBERS.tolist(), strict=True):
        logits, predictions, member = expected(model, row)
        base -= math.log(softmax(logits)[label]) / 5
        for place, (prediction, inside) in enumerate(zip(predictions, [True, *members], strict=True)):
            if inside:
                per_slice[place].append(-math.log(softmax(prediction)[label]))
        indicators -= sum(math.log(q if inside else 1 - q) for q, inside in zip(member, members, strict=True)) / 5
    total = base + indicators + sum(sum(values) / len(values) for values in per_slice if values)
    assert not per_slice[3]
    found = model.loss(x, LABELS, MEMBERS)
    assert found.item() == pytest.approx(total, rel=1e-10)
    found.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_an_expert_learns_from_members_alone():
    """Its own loss gives it no gradient from others; an empty slice's expert has none at all."""
    model, x = heads(), features()
    x.requires_grad_()
    _, predictions, _ = model._heads(x)
    everyone = model.loss(x, LABELS, MEMBERS)
    nobody = model.loss(x, LABELS, torch.zeros_like(MEMBERS))
    # what is left of the difference, besides the indicators', are the means over members
    logits = model.indicators(x)
    indicator = nn.functional.binary_cross_entropy_with_logits
    rest = indicator(logits, MEMBERS.double()) - indicator(logits, torch.zeros_like(MEMBERS).double())
    experts = [nn.functional.cross_entropy(predictions[1 + j][MEMBERS[:, j]], LABELS[MEMBERS[:, j]]) for j in (0, 1)]
    torch.testing.assert_close(everyone - nobody, 3 * rest + sum(experts))
    for j in (0, 1):
        (gradient,) = torch.autograd.grad(experts[j], x, retain_graph=True)
        assert torch.equal(gradient.any(1), MEMBERS[:, j])


def test_without_slices_it_is_the_plain_model():
    head, x = nn.Linear(4, 3), features(torch.float32)
    model = SliceHeads(head, 4, [])
    assert torch.equal(model(x), head(x))
    members = slice_members(range(5), {})
    assert members.shape == (5, 0)
    loss = model.loss(x, LABELS, members)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(head(x), LABELS))
    assert {id(p) for p in model.parameters()} == {id(p) for p in head.parameters()}


def test_batch_mates_do_not_matter():
    model, x = heads(), features()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))
    torch.testing.assert_close(model(x)[[4, 0]], model(x[[4, 0]]))


def test_empty_batch():
    model = heads()
    loss = model.loss(features()[:0], LABELS[:0], MEMBERS[:0])
    assert loss.item() == 0
    assert model(features()[:0]).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_types(dtype):
    model, x = heads(dtype=dtype), features(dtype)
    assert model(x).dtype == dtype
    loss = model.loss(x, LABELS, MEMBERS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), heads().loss(features(), LABELS, MEMBERS), rtol=0.05, atol=0.0)
    loss.backward()


def test_save_load_and_copies():
    model, x = heads(), features()
    other = SliceHeads(nn.Linear(4, 3), 4, model.slices).double()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_the_shared_head_of_the_experts_begins_as_the_head():
    head = nn.Linear(4, 3)
    model = SliceHeads(head, 4, ["a"])
    assert torch.equal(model.predictor.weight, head.weight)
    assert model.predictor.weight is not head.weight


def test_it_can_learn_what_one_head_cannot():
    """Labels that are the other way round within a slice."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)
    members = x[:, 1:2] > 0
    labels = ((x[:, 0] > 0) ^ members[:, 0]).long()
    right = {}
    for slices in ([], ["flipped"]):
        torch.manual_seed(0)
        model = SliceHeads(nn.Linear(3, 2), 3, slices)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            model.loss(x, labels, members[:, : len(slices)]).backward()
            optimizer.step()
        right[len(slices)] = (model(x).argmax(1) == labels).float().mean().item()
    assert right[0] < 0.65
    assert right[1] > 0.8


def test_slicing_functions():
    texts = ["why ?", "a long text without", "", "who is it then ?"]
    members = slice_members(texts, {"question": lambda t: t.endswith("?"), "short": lambda t: len(t.split()) < 3})
    assert members.tolist() == [[True, True], [False, False], [False, True], [True, False]]
    assert members.dtype == torch.bool
    assert slice_members([], {"a": bool}).shape == (0, 1)


def test_mistakes():
    with pytest.raises(ValueError, match="two slices are called 'a'"):
        SliceHeads(nn.Linear(4, 3), 4, ["a", "b", "a"])
    with pytest.raises(ValueError, match=r"members are torch.bool of shape \(5, 2\); booleans of shape \(5, 3\)"):
        heads().loss(features(), LABELS, MEMBERS[:, :2])
    with pytest.raises(ValueError, match=r"members are torch.float32 of shape \(5, 3\)"):
        heads().loss(features(), LABELS, MEMBERS.float())
    with pytest.raises(ValueError, match=r"labels have the shape \(4,\) and logits \(5, 3\)"):
        heads().loss(features(), LABELS[:4], MEMBERS)
