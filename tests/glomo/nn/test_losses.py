import pytest
import torch

import glomo.nn.losses as losses
from glomo.nn.losses import smoothed_cross_entropy


def by_hand(features, weight, targets, smoothing, bias=None, pad=0, shares=None):
    total = 0.0
    shares = torch.ones(targets.shape) if shares is None else shares
    for h, y, share in zip(features.flatten(0, -2), targets.flatten().tolist(), shares.flatten(), strict=True):
        if y == pad:
            continue
        others = torch.arange(len(weight)) != pad
        z = weight @ h + (0 if bias is None else bias)
        log_p = z.masked_fill(~others, float("-inf")).log_softmax(0)
        q = torch.where(others, smoothing / (len(weight) - 1), 0.0)
        q[y] += 1 - smoothing
        total = total - share * (q * log_p)[others].sum()
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk", [10**6, 40])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("pad", [0, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_sum_by_hand_in_any_chunks(monkeypatch, smoothing, chunk, with_bias, pad, shared):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", {"cpu": chunk, "cuda": chunk})
    features, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5, 4), (11, 4)))
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if with_bias else None
    inputs = [features, weight] + ([bias] if with_bias else [])
    targets = torch.randint(0, 11, (3, 5))
    targets[1, 2] = pad
    shares = torch.rand(3, 5, dtype=torch.float64) if shared else None
    found = smoothed_cross_entropy(features, weight, targets, smoothing, pad, bias, shares)
    expected = by_hand(features, weight, targets, smoothing, bias, pad, shares)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(
        *(torch.autograd.grad(3 * out, inputs, retain_graph=True) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight))  # asked again


def test_only_what_is_asked_for_is_made():
    features, weight, targets = torch.randn(6, 4), torch.randn(5, 4), torch.tensor([1, 2, 0, 4, 3, 1])
    expected = by_hand(features, weight, targets, 0.0)
    torch.testing.assert_close(smoothed_cross_entropy(features, weight, targets), expected)
    assert not smoothed_cross_entropy(features, weight, targets).requires_grad
    features.requires_grad_()
    smoothed_cross_entropy(features, weight, targets).backward()  # a frozen embedding
    assert weight.grad is None
    torch.testing.assert_close(features.grad, torch.autograd.grad(by_hand(features, weight, targets, 0.0), features)[0])
    with torch.no_grad():
        torch.testing.assert_close(smoothed_cross_entropy(features, weight, targets), expected)


def test_nothing_but_padding_is_zero():
    features, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = smoothed_cross_entropy(features, weight, torch.zeros(2, 3, dtype=torch.int64), 0.1)
    loss.backward()
    assert loss == 0
    assert (features.grad == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_sums_in_fp32(monkeypatch, autocast):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", {"cpu": 5000 * 16, "cuda": 5000 * 16})
    torch.manual_seed(0)
    features, weight, targets = torch.randn(64, 8), torch.randn(5000, 8), torch.randint(1, 5000, (64,))
    given = [
        x.bfloat16().to(torch.float32 if autocast else torch.bfloat16).requires_grad_() for x in (features, weight)
    ]
    exact = [x.detach().double().requires_grad_() for x in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = smoothed_cross_entropy(*given, targets, 0.1)
    expected = by_hand(*exact, targets, 0.1)
    assert found.dtype == torch.float32
    assert abs(float((found / expected).detach()) - 1) < 1e-3
    found.backward()
    expected.backward()
    for mine, other in zip(given, exact, strict=True):
        assert mine.grad.dtype == mine.dtype
        assert (mine.grad - other.grad).norm() < 0.01 * other.grad.norm()
