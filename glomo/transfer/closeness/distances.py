"""How far a model's outputs are from a source's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from glomo.transfer.closeness.anchors import at_least_fp32

Distance = Literal["kl", "cross-entropy", "squared"]


def output_distance(
    outputs: Tensor, source_outputs: Tensor, distance: Distance = "kl", mask: Tensor | None = None
) -> Tensor:
    """The mean over the examples (and positions) of

    .. code-block:: text

        kl              sum_k p0_k log(p0_k / p_k)
        cross-entropy   - sum_k p0_k log p_k        the same but for the entropy of p0, which has no gradient
        squared         sum_k (o_k - o0_k)^2        on the outputs as they are

    with o the outputs, o0 the source's, p = softmax(o), p0 = softmax(o0). There is no gradient to the source's. A class
    that the source gives no probability (-inf) adds nothing.

    Args:
        outputs: (examples, ..., K).
        source_outputs: the same shape.
        distance: one of the three.
        mask: (examples, ...) of bools: which positions count. The mean over none is 0.

    Raises:
        ValueError: shapes that differ, no dimension for examples, or another distance.

    Source: Yu et al., ICASSP 2013 (kl); Wiese, Weissenborn and Neves, CoNLL 2017 (cross-entropy).
    """
    if outputs.shape != source_outputs.shape or outputs.dim() < 2:
        raise ValueError(
            f"outputs are {tuple(outputs.shape)} and the source's {tuple(source_outputs.shape)}; one shape "
            "(examples, ..., classes) is needed"
        )
    dtype = at_least_fp32(outputs.dtype)
    outputs, source_outputs = outputs.to(dtype), source_outputs.detach().to(dtype)
    if mask is not None:  # before anything is computed: what does not count may be anything, for the gradient too
        _check_mask(mask, outputs.shape[:-1])
        outputs, source_outputs, mask = outputs[mask.bool()], source_outputs[mask.bool()], None
    if distance == "squared":
        ruled_out = (outputs == -torch.inf) & (source_outputs == -torch.inf)
        return mean_over((outputs - source_outputs).masked_fill(ruled_out, 0.0).square().sum(-1), mask)
    if distance not in ("kl", "cross-entropy"):
        raise ValueError(f"distance is {distance!r}; 'kl', 'cross-entropy' or 'squared' is needed")
    targets = source_outputs.softmax(-1)
    values = cross_entropy(targets, outputs)
    if distance == "kl":
        values = values - torch.special.entr(targets).sum(-1)
    return mean_over(values, mask)


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """- sum_k t_k log softmax(logits)_k, both (..., K) -> (...); zero times -infinity is zero."""
    return -(targets * logits.log_softmax(-1).masked_fill(targets == 0, 0.0)).sum(-1)


def mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of those that count, 0 if there are none.

    Raises:
        ValueError: the mask is of another shape.
    """
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    _check_mask(mask, values.shape)
    mask = mask.bool()
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    if mask.shape != shape:
        raise ValueError(f"mask is {tuple(mask.shape)}; {tuple(shape)} is needed, a bool for each position")
