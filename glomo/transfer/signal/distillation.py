"""Distillation: a student learns what a teacher, or several, would say."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from glomo.transfer.divergence import (
    check_labels,
    kl_divergence,
    log_probabilities,
    mean_log_probabilities,
    mean_or_zero,
    selected,
)


def distillation_loss(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 2.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy to the labels, and divergence from the teacher's softened predictions:

    .. code-block:: text

        L = (1 - alpha) CE(y, z_s) + alpha T^2 KL(p_t || softmax(z_s / T))
        p_t = softmax(z_t / T),     of several teachers (1 / M) sum_m softmax(z_m / T)

    KL is summed over classes, and both terms are averaged over examples. T^2 makes the gradient as large at every
    temperature: for large T it tends to ((z_s - mean z_s) - (z_t - mean z_t)) / K, whatever T. Nothing flows into the
    teacher.

    Args:
        student: logits z_s, (..., K).
        teacher: logits z_t of the same shape, or those of several teachers; the mean is that of their probabilities
            at temperature T. The output of an `Ensemble` is one teacher, whose mean was taken at temperature 1.
        labels: (...) int64; None only for alpha = 1, on examples without labels.
        alpha: share of the teacher, from 0 to 1 (published: 0.5 to 0.9).
        temperature: T above 0 (published: 2 to 20).
        mask: (...) bool, the examples or positions that count; labels of others may be anything.

    Returns:
        a scalar, in fp32 at least; zero where nothing counts.

    Raises:
        ValueError: shapes that do not fit; alpha or temperature out of range; no labels while alpha is below 1.

    Source: Hinton, Vinyals & Dean, arXiv 1503.02531, section 2.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; a number from 0 (labels alone) to 1 (the teacher alone) is needed")
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if not teachers or any(one.shape != student.shape for one in teachers):
        shapes = ", ".join(str(tuple(one.shape)) for one in teachers)
        raise ValueError(
            f"the student's logits have the shape {tuple(student.shape)} and the teacher's {shapes or 'none'}; at "
            "least one teacher is needed, and one shape"
        )
    log_teacher = mean_log_probabilities([one.detach() for one in teachers], temperature)
    chosen, log_teacher = selected(mask, student, log_teacher.to(student.device))
    soft = mean_or_zero(kl_divergence(log_teacher, log_probabilities(chosen, temperature)))
    loss = alpha * temperature**2 * soft
    if alpha == 1:
        return loss
    if labels is None:
        raise ValueError(f"labels are None and alpha is {alpha}; without labels alpha must be 1")
    check_labels(labels, student)
    of_chosen = labels.flatten() if mask is None else labels[mask]
    return loss + (1 - alpha) * mean_or_zero(F.cross_entropy(log_probabilities(chosen), of_chosen, reduction="none"))
