import pytest
import torch

import glomo.nn.losses as losses
from glomo.nn.losses import smoothed_cross_entropy


def by_hand(features, weight, targets, smoothing, bias):
    total = 0.0
    for h, y in zip(features.flatten(0, -2), targets.flatten().tolist(), strict=True):
        if y == 0:
            continue
        z = weight @ h + (0 if bias is None else bias)
        log_p = z[1:].log_softmax(0)
        q = torch.full_like(log_p, smoothing / len(log_p))
        q[y - 1] += 1 - smoothing
        total = total - (q * log_p).sum()
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk", [10**6, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_sum_by_hand_in_any_chunks(monkeypatch, smoothing, chunk, with_bias):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    features, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5, 4), (11, 4)))
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if with_bias else None
    inputs = [features, weight] + ([bias] if with_bias else [])
    targets = torch.randint(0, 11, (3, 5))
    found = smoothed_cross_entropy(features, weight, targets, smoothing, bias=bias)
    expected = by_hand(features, weight, targets, smoothing, bias)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(*(torch.autograd.grad(out, inputs) for out in (found, expected)), strict=True):
        torch.testing.assert_close(mine, other)


def test_nothing_but_padding_is_zero():
    features, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4)
    loss = smoothed_cross_entropy(features, weight, torch.zeros(2, 3, dtype=torch.int64), 0.1)
    loss.backward()
    assert loss == 0
    assert (features.grad == 0).all()


def test_half_precision_sums_in_fp32():
    features, weight, targets = torch.randn(64, 8), torch.randn(5000, 8), torch.randint(1, 5000, (64,))
    exact = smoothed_cross_entropy(features.bfloat16().double(), weight.bfloat16().double(), targets, 0.1)
    found = smoothed_cross_entropy(features.bfloat16(), weight.bfloat16(), targets, 0.1)
    assert found.dtype == torch.float32
    assert abs(float(found / exact) - 1) < 1e-3
