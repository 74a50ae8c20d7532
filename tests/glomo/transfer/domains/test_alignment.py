"""CORAL and MMD against numpy, in loops and fp64."""

import numpy as np
import pytest
import torch

from glomo.transfer.domains import coral, mmd


def batches(n, m, d, dtype=torch.float64, shift=0.5):
    generator = torch.Generator().manual_seed(n + 10 * m + 100 * d)
    source = torch.randn(n, d, generator=generator, dtype=torch.float64)
    target = 1.5 * torch.randn(m, d, generator=generator, dtype=torch.float64) + shift
    return source.to(dtype), target.to(dtype)


def coral_oracle(source, target):
    d = source.shape[1]
    c_s, c_t = (np.cov(x, rowvar=False).reshape(d, d) for x in (source, target))
    return sum((c_s[i, j] - c_t[i, j]) ** 2 for i in range(d) for j in range(d)) / (4 * d * d)


def mmd_oracle(source, target, widths, unit=None):
    everything = [*source, *target]
    n = len(everything)
    if unit is None:
        squares = [((everything[i] - everything[j]) ** 2).sum() for i in range(n) for j in range(n) if i != j]
        unit = np.sqrt(np.mean(squares)) or 1.0

    def k(x, y):
        return np.mean([np.exp(-((x - y) ** 2).sum() / (2 * (w * unit) ** 2)) for w in widths])

    def within(rows):
        return np.mean([k(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])

    return within(source) + within(target) - 2 * np.mean([k(a, b) for a in source for b in target])


SIZES = [(2, 2, 1), (5, 3, 4), (9, 2, 7)]


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_coral(n, m, d):
    source, target = batches(n, m, d)
    expected = coral_oracle(source.numpy(), target.numpy())
    assert coral(source, target).item() == pytest.approx(expected, rel=1e-12)
    moved = coral(source + 1e3, target - 7)  # means do not matter
    assert moved.item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
@pytest.mark.parametrize("unit", [None, 0.8])
def test_mmd(n, m, d, unit):
    source, target = batches(n, m, d)
    expected = mmd_oracle(source.numpy(), target.numpy(), (0.25, 0.5, 1, 2, 4), unit)
    assert mmd(source, target, unit=unit).item() == pytest.approx(expected, rel=1e-10, abs=1e-13)
    expected = mmd_oracle(source.numpy(), target.numpy(), (0.7,), unit)
    assert mmd(source, target, (0.7,), unit).item() == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_mmd_is_unbiased():
    """Over many draws from one distribution the mean is 0, and single values lie on both sides of it. With the
    diagonals counted it would be above 0.1 here."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(400):
        x = torch.randn(11, 2, generator=generator, dtype=torch.float64)
        values.append(mmd(x[:6], x[6:], (1.0,), 1.0).item())
    error = np.std(values) / 20
    assert abs(np.mean(values)) < 3 * error < 0.05
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("loss", [coral, lambda s, t: mmd(s, t, unit=1.3), mmd])
def test_gradients(loss):
    source, target = (x.requires_grad_() for x in batches(4, 3, 2))
    if loss is not mmd:
        assert torch.autograd.gradcheck(loss, (source, target))
        return
    # the unit is a constant for the gradient
    both = torch.cat([source, target]).detach()
    unit = torch.pdist(both).square().mean().sqrt().item()
    found = torch.autograd.grad(mmd(source, target), (source, target))
    expected = torch.autograd.grad(mmd(source, target, unit=unit), (source, target))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [coral, mmd])
def test_dtypes_and_autocast(loss):
    exact = loss(*batches(40, 30, 5)).item()
    assert loss(*batches(40, 30, 5, torch.float32)).item() == pytest.approx(exact, rel=1e-4)
    half = loss(*batches(40, 30, 5, torch.bfloat16))
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact, rel=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*batches(40, 30, 5, torch.float32))
    assert torch.equal(found, loss(*batches(40, 30, 5, torch.float32)))


@pytest.mark.parametrize("loss", [coral, mmd])
def test_features_that_are_all_equal(loss):
    source, target = torch.full((3, 4), 0.1, requires_grad=True), torch.full((2, 4), 0.1)
    found = loss(source, target)
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-12)
    assert not source.grad.any()


def test_almost_equal_features_far_from_the_origin():
    source, target = batches(6, 5, 3)
    source, target = 1000 + 1e-2 * source, 1000 + 1e-2 * target
    expected = mmd_oracle(source.numpy(), target.numpy(), (0.5, 1))
    assert mmd(source.float(), target.float(), (0.5, 1)).item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("loss", [coral, mmd])
def test_minimising_brings_the_domains_together(loss):
    source, target = batches(30, 20, 2, shift=1.0)
    turn = torch.eye(2, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([turn, shift], 0.05)
    before = loss(source, target).item()
    for _ in range(100):
        optimizer.zero_grad()
        value = loss(source, target @ turn + shift)
        value.backward()
        optimizer.step()
    assert value.item() < 0.2 * before
    if loss is mmd:
        assert (target @ turn + shift - source.mean(0)).mean(0).abs().max() < 0.4


@pytest.mark.parametrize("loss", [coral, mmd])
def test_mistakes(loss):
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"source has the shape \(3, 4\) and target \(3, 5\); .* equal features"):
        loss(x, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"target \(4,\)"):
        loss(x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"target \(1, 4\); at least 2 examples each"):
        loss(x, x[:1])


def test_mistakes_of_bandwidths():
    x = torch.zeros(3, 4)
    for bandwidths, unit in (((), None), ((1.0, 0.0), None), ((1.0,), 0.0)):
        with pytest.raises(ValueError, match=r"numbers above 0 are needed"):
            mmd(x, x, bandwidths, unit)
