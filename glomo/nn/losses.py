"""Cross-entropy over a large vocabulary, whose gradient is taken while the logits are there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from glomo.nn.precision import at_least_fp32

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**24}
"""Logits alive at a time, by the type of device (16 MiB and 64 MiB in fp32)."""


def smoothed_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    pad: int = 0,
    bias: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """The sum over all targets y other than ``pad`` of the cross-entropy in nats, with label smoothing over the units
    that can be meant:

    .. code-block:: text

        z = weight h + bias,  z_pad = -inf,  p = softmax z
        loss = -(1 - smoothing) log p_y - smoothing mean_{v != pad} log p_v

    (PyTorch's own label_smoothing also gives padding its share.) The forward pass goes on to the gradient while it has
    a chunk's logits,

    .. code-block:: text

        dloss/dz_v = p_v - (1 - smoothing) [v = y] - smoothing / (V - 1)    (v != pad)

    and through it to those of features, weight and bias, which the backward pass only scales. No logits are computed
    twice or outlive their chunk. There is no second derivative.

    Args:
        features: (..., dim).
        weight: (V, dim), often the embedding's.
        targets: (...), int64 ids below V.
        bias: (V,), or none.
        shares: (...), what each target's loss is multiplied by; none: 1. It gets no gradient.

    Source: Szegedy et al., CVPR 2016; Vaswani et al., NeurIPS 2017.
    """
    kept = targets.flatten() != pad
    features, targets = features.flatten(0, -2), targets.flatten()
    shares = None if shares is None else shares.detach().flatten()
    if not bool(kept.all()):  # a copy that a running text does not need
        features, targets = features[kept], targets[kept]
        shares = None if shares is None else shares[kept]
    return _Summed.apply(features, weight, bias, targets, smoothing, pad, torch.is_grad_enabled(), shares)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        smoothing: float,
        pad: int,
        with_gradients: bool,
        shares: Tensor | None,
    ) -> Tensor:
        device, dtype = features.device.type, features.dtype
        wide = at_least_fp32(dtype)  # of sums
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        total = features.new_zeros((), dtype=wide)
        needs = [with_gradients and need for need in ctx.needs_input_grad[:3]]
        for_features = torch.empty_like(features) if needs[0] else None
        for_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        for_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None
        rows = max(1, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"]) // weight.size(0))
        with torch.autocast(device, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for i in range(0, len(features), rows):
                h, y = features[i : i + rows].to(dtype), targets[i : i + rows, None]
                z = F.linear(h, w, b).to(wide)
                z[:, pad] = float("-inf")
                log_p = z.log_softmax(-1)
                part = 1.0 if shares is None else shares[i : i + rows, None].to(wide)
                total -= (1 - smoothing) * (part * log_p.gather(1, y)).sum()
                if smoothing:
                    share = smoothing / (weight.size(0) - 1)
                    log_p[:, pad] = 0
                    total -= share * (part * log_p.sum(1, keepdim=True)).sum()
                if not any(needs):
                    continue
                gradient = log_p.exp_()  # of the logits
                gradient.scatter_add_(1, y, gradient.new_full((), smoothing - 1).expand_as(y))
                if smoothing:
                    gradient -= share
                    gradient[:, pad] = 0
                if shares is not None:
                    gradient *= part
                if for_bias is not None:
                    for_bias += gradient.sum(0)
                gradient = gradient.to(dtype)
                if for_features is not None:
                    for_features[i : i + rows] = gradient @ w
                if for_weight is not None and dtype == wide:
                    for_weight.addmm_(gradient.mT, h)
                elif for_weight is not None:
                    for_weight += gradient.mT @ h
        ctx.save_for_backward(
            for_features,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if for_bias is None or bias is None else for_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors]
        return *gradients, None, None, None, None, None
