"""How well scores of classes find the right one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class GeneralisedAccuracy(NamedTuple):
    """Accuracies where seen and unseen classes compete, each the mean over its classes."""

    seen: float
    unseen: float
    harmonic: float
    """2 seen unseen / (seen + unseen): high only if both are"""


def hit_at_k(scores: Tensor, targets: Tensor, k: int = 1) -> float:
    """The share of examples whose class is among the k with the highest scores.

    Where classes tie for the last places an example counts the share of the ties that would be right: equal scores for
    all C classes give k / C, whatever their order.

    Args:
        scores: (B, C), of the classes in question.
        targets: (B,): column of the right class.
        k: from 1 on; from C on every example is a hit.

    Raises:
        ValueError: other shapes, no example, a target that is no column, a score that is no number, or k below 1.
    """
    return _hits(scores, targets, k).mean().item()


def generalised_accuracy(scores: Tensor, targets: Tensor, seen: Sequence[int]) -> GeneralisedAccuracy:
    """Generalised zero-shot: every example may be of any class, seen in training or not.

    .. code-block:: text

        a class's accuracy: hit@1 over its examples
        seen, unseen:       the means over the seen and the unseen classes that have examples
        harmonic:           2 seen unseen / (seen + unseen), 0 if both are

    Args:
        scores: (B, C), of all classes.
        targets: (B,).
        seen: columns of the classes that the training had.

    Raises:
        ValueError: as in `hit_at_k`; seen or unseen classes have no example.

    Source: Xian, Schiele & Akata, CVPR 2017.
    """
    hits, known = _hits(scores, targets, 1), set(seen)
    of_class = {int(c): hits[targets == c].mean().item() for c in targets.unique()}
    groups = [[value for c, value in of_class.items() if (c in known) == wanted] for wanted in (True, False)]
    if not all(groups):
        raise ValueError(
            f"{len(groups[0])} seen and {len(groups[1])} unseen classes have examples; at least 1 of both is needed"
        )
    a, b = (sum(group) / len(group) for group in groups)
    return GeneralisedAccuracy(a, b, 2 * a * b / (a + b) if a + b else 0.0)


def _hits(scores: Tensor, targets: Tensor, k: int) -> Tensor:
    """(B,) in fp64: from 0 to 1."""
    if scores.dim() != 2 or targets.shape != scores.shape[:1] or not scores.numel():
        raise ValueError(
            f"scores have the shape {tuple(scores.shape)} and targets {tuple(targets.shape)}; (B, C) and (B,) with at "
            "least 1 example are needed"
        )
    if k < 1:
        raise ValueError(f"k is {k}; at least 1 is needed")
    if bool(((targets < 0) | (targets >= scores.size(1))).any()):
        lowest, highest = targets.min().item(), targets.max().item()
        raise ValueError(f"targets go from {lowest} to {highest}; from 0 to {scores.size(1) - 1} is needed")
    if bool(scores.isnan().any()):
        raise ValueError("a score is not a number (NaN); scores that can be compared are needed")
    own = scores.gather(1, targets[:, None])
    higher = (scores > own).sum(1)
    tied = (scores == own).sum(1)  # with itself
    return ((k - higher) / tied).clamp(0, 1).to(torch.float64)
