"""Cross-entropy over a large vocabulary, whose gradient is taken while the logits are there."""

from __future__ import annotations

from typing import Any

import torch
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
        for_weight = torch.zeros_like(weight.mT, dtype=wide) if needs[1] else None  # (dim, V): no transposed copies
        for_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None
        rows = min(max(1, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"]) // weight.size(0)), max(1, len(features)))
        with torch.autocast(device, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(wide)
            part = features.new_ones(len(features), dtype=wide) if shares is None else shares.to(wide)
            share = smoothing / (weight.size(0) - 1)
            # One buffer takes the logits of every chunk, all that follows is done in place, and one more takes products
            # in another dtype: to allocate and first touch them each time would cost as much as the arithmetic.
            logits = features.new_empty(rows, weight.size(0), dtype=wide)
            narrow = logits if dtype == wide else torch.empty_like(logits, dtype=dtype)
            for i in range(0, len(features), rows):
                h, y, scale = features[i : i + rows].to(dtype), targets[i : i + rows, None], part[i : i + rows, None]
                z, product = logits[: len(h)], narrow[: len(h)]
                torch.mm(h, w.mT, out=product)
                if dtype != wide:
                    z.copy_(product)
                if b is not None:
                    z += b
                of_all = z.sum(1, keepdim=True) - z[:, pad, None] if smoothing else 0.0
                z[:, pad] = float("-inf")
                of_target, greatest = z.gather(1, y), z.amax(1, keepdim=True)
                z -= greatest
                sums = z.exp_().sum(1, keepdim=True)
                log_sum = greatest + sums.log()
                total -= (1 - smoothing) * (scale * (of_target - log_sum)).sum()
                if smoothing:
                    total -= share * (scale * (of_all - (weight.size(0) - 1) * log_sum)).sum()
                if not any(needs):
                    continue
                z *= scale / sums  # from here on the gradient of the logits
                z.scatter_add_(1, y, (smoothing - 1) * scale)
                if smoothing:
                    z -= share * scale
                    z[:, pad] = 0
                if for_bias is not None:
                    for_bias += z.sum(0)
                if dtype != wide:
                    product.copy_(z)
                if for_features is not None:
                    for_features[i : i + rows] = product @ w
                if for_weight is not None and dtype == wide:
                    for_weight.addmm_(h.mT, product)
                elif for_weight is not None:
                    for_weight += h.mT.contiguous() @ product
        ctx.save_for_backward(
            for_features,
            None if for_weight is None else for_weight.mT.to(weight.dtype, memory_format=torch.contiguous_format),
            None if for_bias is None or bias is None else for_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors]
        return *gradients, None, None, None, None, None
