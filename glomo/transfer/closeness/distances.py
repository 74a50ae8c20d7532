"""How far a model's outputs are from a source's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from glomo.nn.precision import wide
from glomo.transfer.divergence import cross_entropy, kl_divergence, log_probabilities, mean_or_zero, selected

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
        ValueError: shapes that differ, no dimension for examples, a mask without bools, or another distance.

    Source: Yu et al., ICASSP 2013 (kl); Wiese, Weissenborn and Neves, CoNLL 2017 (cross-entropy).
    """
    if outputs.shape != source_outputs.shape or outputs.dim() < 2:
        raise ValueError(
            f"outputs are {tuple(outputs.shape)} and the source's {tuple(source_outputs.shape)}; one shape "
            "(examples, ..., classes) is needed"
        )
    # before anything is computed: what does not count may be anything, for the gradient too
    outputs, source_outputs = selected(mask, wide(outputs), wide(source_outputs.detach()))
    if distance == "squared":
        ruled_out = (outputs == -torch.inf) & (source_outputs == -torch.inf)
        return mean_or_zero((outputs - source_outputs).masked_fill(ruled_out, 0.0).square().sum(-1))
    log_p, log_q = log_probabilities(source_outputs.to(outputs.dtype)), log_probabilities(outputs)
    if distance == "kl":
        return mean_or_zero(kl_divergence(log_p, log_q))
    if distance == "cross-entropy":
        return mean_or_zero(cross_entropy(log_p.exp(), log_q))
    raise ValueError(f"distance is {distance!r}; 'kl', 'cross-entropy' or 'squared' is needed")
