"""Training signal annealing against its formulas."""

import math

import pytest
import torch
from torch import nn

from glomo.transfer.signal import tsa_loss, tsa_threshold


@pytest.mark.parametrize(
    ("schedule", "a"),
    [
        ("linear", [0, 0.25, 0.5, 1]),
        ("exp", [math.exp(-5), math.exp(-3.75), math.exp(-2.5), 1]),
        ("log", [0, 1 - math.exp(-1.25), 1 - math.exp(-2.5), 1 - math.exp(-5)]),
    ],
)
@pytest.mark.parametrize("classes", [2, 5])
def test_thresholds(schedule, a, classes):
    found = [tsa_threshold(step, 1000, classes, schedule) for step in (0, 250, 500, 1000)]
    assert found == pytest.approx([one * (1 - 1 / classes) + 1 / classes for one in a], rel=1e-12)
    assert tsa_threshold(5000, 1000, classes, schedule) == found[-1]


def test_sure_examples_are_left_out_of_the_mean():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.3]], dtype=torch.float64)
    logits.requires_grad_()
    labels = torch.tensor([0, 1, 1, 2])  # p(correct): 0.79, 0.91, 0.21, 0.40
    right = [
        math.exp(row[y]) / sum(map(math.exp, row)) for row, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    for threshold, left in ((0.95, [0, 1, 2, 3]), (0.8, [0, 2, 3]), (0.5, [2, 3]), (0.3, [2])):
        loss = tsa_loss(logits, labels, threshold)
        assert loss.item() == pytest.approx(-sum(math.log(right[n]) for n in left) / len(left), rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.any(1).nonzero().flatten().tolist() == left


def test_zero_where_none_is_left():
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0]], requires_grad=True)
    loss = tsa_loss(logits, torch.tensor([0, 1]), 0.5)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()
    assert tsa_loss(logits[:0], torch.tensor([], dtype=torch.int64), 0.5).item() == 0


def test_at_the_end_it_is_the_cross_entropy():
    logits, labels = torch.randn(6, 4, 3), torch.randint(3, (6, 4))
    loss = tsa_loss(logits, labels, tsa_threshold(10, 10, 3))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    half = tsa_loss(logits.bfloat16(), labels, 1.0)
    assert half.dtype == torch.float32


def test_mistakes():
    with pytest.raises(ValueError, match="step is -1 of 10"):
        tsa_threshold(-1, 10, 2)
    with pytest.raises(ValueError, match="step is 0 of 0"):
        tsa_threshold(0, 0, 2)
    with pytest.raises(ValueError, match="classes is 1; at least 2"):
        tsa_threshold(0, 10, 1)
    with pytest.raises(ValueError, match="schedule is 'cosine'; 'linear', 'exp' or 'log' is needed"):
        tsa_threshold(0, 10, 2, "cosine")
    with pytest.raises(ValueError, match=r"labels have the shape \(3,\) and logits \(2, 2\)"):
        tsa_loss(torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), 0.5)
