"""Metrics against counts by hand."""

import pytest
import torch

from glomo.transfer.zero_shot import generalised_accuracy, hit_at_k


def test_hits():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [-1.0, -3.0, -2.0], [0.0, -torch.inf, 1.0]])
    targets = torch.tensor([1, 2, 2, 0])  # ranks 1, 3, 2, 2
    assert [hit_at_k(scores, targets, k) for k in (1, 2, 3, 9)] == [0.25, 0.75, 1.0, 1.0]


def test_against_a_sort():
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(7, (50,), generator=torch.Generator().manual_seed(1))
    for k in range(1, 8):
        expected = sum(t in row.argsort(descending=True)[:k] for row, t in zip(scores, targets, strict=True)) / 50
        assert hit_at_k(scores, targets, k) == pytest.approx(expected)


def test_ties_are_chance_whatever_their_order():
    """A model that gives all classes one score must not look perfect where the right one stands first."""
    for target in range(4):
        assert hit_at_k(torch.zeros(1, 4), torch.tensor([target])) == 0.25
        assert hit_at_k(torch.full((1, 4), -torch.inf), torch.tensor([target]), 3) == 0.75
    scores = torch.tensor([[5.0, 1.0, 1.0, 1.0, 0.0]])  # two places are left, three classes tie for them
    assert hit_at_k(scores, torch.tensor([2]), 3) == pytest.approx(2 / 3)
    assert hit_at_k(scores, torch.tensor([4]), 4) == 0
    assert hit_at_k(scores, torch.tensor([2]), 1) == 0


def test_generalised():
    #              class 0, seen: 3 of 4    class 1, seen: 1 of 1   class 2, unseen: 1 of 2   3: no example
    targets = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    answers = torch.tensor([0, 0, 0, 2, 1, 2, 0])
    scores = torch.eye(4)[answers]
    found = generalised_accuracy(scores, targets, seen=[0, 1])
    assert found.seen == pytest.approx((0.75 + 1) / 2)  # classes count the same, not examples
    assert found.unseen == pytest.approx(0.5)
    assert found.harmonic == pytest.approx(2 * 0.875 * 0.5 / 1.375)


def test_a_model_that_only_knows_seen_classes_has_no_harmonic_mean():
    scores = torch.eye(2)[torch.zeros(4, dtype=torch.int64)]
    assert generalised_accuracy(scores, torch.tensor([0, 0, 1, 1]), [0]) == (1.0, 0.0, 0.0)
    always_third = torch.eye(3)[torch.full((4,), 2)]
    assert generalised_accuracy(always_third, torch.tensor([0, 0, 1, 1]), [0]) == (0.0, 0.0, 0.0)


def test_mistakes():
    scores, targets = torch.zeros(2, 3), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and targets \(3,\)"):
        hit_at_k(scores, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"at least 1 example"):
        hit_at_k(scores[:0], targets[:0])
    with pytest.raises(ValueError, match=r"k is 0; at least 1"):
        hit_at_k(scores, targets, 0)
    with pytest.raises(ValueError, match=r"targets go from 0 to 3; from 0 to 2"):
        hit_at_k(scores, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"not a number"):
        hit_at_k(torch.full((2, 3), torch.nan), targets)
    with pytest.raises(ValueError, match=r"2 seen and 0 unseen classes have examples"):
        generalised_accuracy(scores, targets, [0, 2])
