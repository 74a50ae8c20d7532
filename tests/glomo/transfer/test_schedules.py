"""Schedules against the formulas as published, at lengths where these are sound and where they are not."""

import math

import pytest
import torch
from torch import nn

from glomo.transfer import SlantedTriangular, schedule, slanted_triangular
from glomo.transfer.schedules import constant, cosine, inverse_sqrt, linear


def published(t, steps, cut_frac, ratio):
    """Howard & Ruder (2018), equation 3, over eta_max."""
    cut = math.floor(steps * cut_frac)
    p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
    return (1 + p * (ratio - 1)) / ratio


@pytest.mark.parametrize(
    ("steps", "cut_frac", "ratio"), [(100, 0.1, 32), (1000, 0.1, 32), (64, 0.25, 8), (40, 0.125, 8)]
)
def test_slanted_triangular_is_the_published_one(steps, cut_frac, ratio):
    found = [slanted_triangular(t, steps, cut_frac, ratio) for t in range(steps)]
    assert found == pytest.approx([published(t, steps, cut_frac, ratio) for t in range(steps)], abs=1e-12)
    assert max(found) == 1.0


@pytest.mark.parametrize("steps", [*range(1, 40), 1005])
def test_slanted_triangular_at_every_length(steps):
    """As printed it is negative at the end of 15 steps, below the least rate at 1005, and 0/0 below 10."""
    found = [slanted_triangular(t, steps) for t in range(steps)]
    assert all(1 / 32 <= factor <= 1 for factor in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    if steps == 15:
        assert published(14, 15, 0.1, 32) < 0
    assert slanted_triangular(10**6, steps) == 1 / 32


@pytest.mark.parametrize(("cut_frac", "ratio"), [(0.0, 32), (1.0, 32), (0.1, 0.5)])
def test_mistakes(cut_frac, ratio):
    with pytest.raises(ValueError, match=f"cut_frac is {cut_frac} and ratio {ratio}"):
        slanted_triangular(0, 10, cut_frac, ratio)


def test_the_transformers_schedule():
    """lr = d^-0.5 min(step^-0.5, step warmup^-1.5), steps counted from 1 (Vaswani et al. 2017)."""
    warm, highest = 4000, (512 * 4000) ** -0.5
    for step in (1, 1000, 4000, 4001, 100_000):
        expected = 512**-0.5 * min(step**-0.5, step * warm**-1.5)
        assert highest * inverse_sqrt(step - 1, 100_000, warm) == pytest.approx(expected)


def test_the_others():
    assert [linear(t, 6, 2) for t in range(6)] == pytest.approx([0.5, 1, 0.75, 0.5, 0.25, 0])
    assert [cosine(t, 4) for t in range(4)] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)]
    )
    assert [constant(t, 4, 2) for t in range(4)] == [0.5, 1, 1, 1]


def test_in_a_loop_of_ones_own():
    """Each group keeps its own highest rate."""
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [w], "lr": lr} for w, lr in zip(weights, (1.0, 0.5), strict=True)])
    scheduler, rates = SlantedTriangular(optimizer, 20), []
    for _ in range(20):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    expected = [slanted_triangular(t, 20) for t in range(20)]
    assert [rate[0] for rate in rates] == pytest.approx(expected)
    assert [2 * rate[1] for rate in rates] == pytest.approx(expected)
    schedule(optimizer, cosine, 10, warmup_steps=3)
