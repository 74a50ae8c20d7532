"""Consistency: a perturbed example is to be predicted as the clean one is, which needs no label."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from glomo.transfer.divergence import kl_divergence, log_probabilities, mean_or_zero, selected


def consistency_loss(
    clean: Tensor,
    perturbed: Tensor,
    divergence: Literal["kl", "squared"] = "kl",
    temperature: float = 1.0,
    confidence: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """How far the prediction for a perturbed example is from that for the clean one, which is the target:

    .. code-block:: text

        p = softmax(z / T), no gradient;    q = softmax(z')
        D = sum_k p_k (log p_k - log q_k)                   "kl"
            (1 / K) sum_k (p_k - q_k)^2                     "squared"
        L = (1 / B) sum_b [max_k softmax(z)_k > confidence] D_b

    A temperature below 1 sharpens the target alone, and the confidence is that before sharpening. Examples that fall
    short of it add nothing, and still count in B.

    Args:
        clean: logits z (..., K) of the clean examples, such as of the same model or of a mean teacher
            (`ExponentialAverage`). No gradient flows into them.
        perturbed: logits z' of the perturbed ones.
        temperature: T above 0 (published for texts: 0.85).
        confidence: from 0 to 1; None: all examples.
        mask: (...) bool, the examples or positions that count, in B too.

    Returns:
        a scalar, in fp32 at least; zero where nothing counts.

    Raises:
        ValueError: shapes that do not fit; temperature or confidence out of range; an unknown divergence.

    Source: Xie et al., NeurIPS 2020 (UDA), section 2; Tarvainen & Valpola, NeurIPS 2017 (squared).
    """
    if clean.shape != perturbed.shape:
        raise ValueError(
            f"clean logits have the shape {tuple(clean.shape)} and perturbed {tuple(perturbed.shape)}; one is needed"
        )
    if divergence not in ("kl", "squared"):
        raise ValueError(f"divergence is {divergence!r}; 'kl' or 'squared' is needed")
    if confidence is not None and not 0 <= confidence <= 1:
        raise ValueError(f"confidence is {confidence}; a number from 0 to 1 is needed, or None")
    clean, perturbed = selected(mask, clean.detach(), perturbed)
    count = perturbed[..., 0].numel()
    if confidence is not None:
        sure = log_probabilities(clean).amax(-1).exp() > confidence
        clean, perturbed = clean[sure], perturbed[sure]
    log_p, log_q = log_probabilities(clean, temperature), log_probabilities(perturbed)
    if divergence == "kl":
        return mean_or_zero(kl_divergence(log_p, log_q), count)
    return mean_or_zero((log_p.exp() - log_q.exp()).square().mean(-1), count)


def consistency_ramp(epoch: float, epochs: float) -> float:
    """The factor of the consistency's weight, while what the model says is not worth much yet:

    .. code-block:: text

        exp(-5 (1 - e / E)^2)           from 0.0067 to 1; 1 after E

    Raises:
        ValueError: epoch or epochs is below 0.

    Source: Laine & Aila, ICLR 2017.
    """
    if epoch < 0 or epochs < 0:
        raise ValueError(f"epoch is {epoch} of {epochs}; both must be at least 0")
    return math.exp(-5 * (1 - epoch / epochs) ** 2) if epoch < epochs else 1.0
