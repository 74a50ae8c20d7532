"""Cross-entropy over a large vocabulary, in bounded memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**24
"""Logits alive at a time (64 MiB in fp32)."""


def smoothed_cross_entropy(
    features: Tensor, weight: Tensor, targets: Tensor, smoothing: float = 0.0, pad: int = 0, bias: Tensor | None = None
) -> Tensor:
    """The sum over all targets other than ``pad`` of the cross-entropy in nats, with label smoothing over the units
    that can be meant:

    .. code-block:: text

        z = weight h + bias,  z_pad = -inf,   loss = log sum exp z - (1 - smoothing) z_y - smoothing mean_{v != pad} z_v

    (PyTorch's own label_smoothing also gives padding its share.) Long batches go in chunks, whose logits are computed
    again in the backward pass.

    Args:
        features: (..., dim).
        weight: (V, dim), often the embedding's.
        targets: (...), int64 ids below V.

    Source: Szegedy et al., CVPR 2016; Vaswani et al., NeurIPS 2017.
    """
    kept = targets.flatten() != pad
    features, targets = features.flatten(0, -2)[kept], targets.flatten()[kept]
    rows = max(1, CHUNK_LOGITS // max(weight.size(0), 1))
    total = features.new_zeros((), dtype=torch.float64 if features.dtype == torch.float64 else torch.float32)
    for i in range(0, max(len(features), 1), rows):  # one even if there is nothing, for the gradient
        chunk = (features[i : i + rows], weight, targets[i : i + rows], smoothing, pad, bias)
        if torch.is_grad_enabled() and len(features) > rows:
            total = total + checkpoint(_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _chunk(*chunk)
    return total


def _chunk(
    features: Tensor, weight: Tensor, targets: Tensor, smoothing: float, pad: int, bias: Tensor | None
) -> Tensor:
    logits = F.linear(features, weight, bias)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    units = torch.arange(weight.size(0), device=logits.device) != pad
    loss = logits.masked_fill(~units, float("-inf")).logsumexp(-1).sum()
    loss = loss - (1 - smoothing) * logits.gather(-1, targets[:, None]).sum()
    if smoothing:
        loss = loss - smoothing / (weight.size(0) - 1) * logits[:, units].sum()
    return loss
