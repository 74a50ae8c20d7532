"""Distances between the features of two domains, to be made small: baselines beside an adversary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glomo.nn.precision import wide

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def coral(source: Tensor, target: Tensor) -> Tensor:
    """How far the covariances of two batches of features are apart (CORAL):

    .. code-block:: text

        ||C_S - C_T||_F^2 / (4 d^2),     C = (X - mean)^T (X - mean) / (n - 1)

    Args:
        source: (n, d).
        target: (m, d); m may be another number than n.

    Raises:
        ValueError: the widths differ, or a batch has fewer than 2 examples.

    Source: Sun & Saenko, ECCV workshops 2016 (Deep CORAL).
    """
    _check(source, target)
    with torch.autocast(source.device.type, enabled=False):
        difference = _covariance(wide(source)) - _covariance(wide(target))
        return difference.square().sum() / (4 * source.size(1) ** 2)


def mmd(source: Tensor, target: Tensor, bandwidths: Sequence[float] = BANDWIDTHS, unit: float | None = None) -> Tensor:
    """The squared maximum mean discrepancy of two batches of features, unbiased: below 0 at times, where there is no
    difference.

    .. code-block:: text

        mean_{i != j} k(s_i, s_j) + mean_{i != j} k(t_i, t_j) - 2 mean_{i, j} k(s_i, t_j)
        k(x, y) = mean over the bandwidths w of exp(-||x - y||^2 / (2 (w unit)^2))

    Args:
        source: (n, d).
        target: (m, d); m may be another number than n.
        bandwidths: of the Gaussian kernels, in units.
        unit: of the bandwidths. None: the root of the mean squared distance of any two examples of the batch, without
            a gradient; it then depends on the batch.

    Raises:
        ValueError: the features' widths differ, a batch has fewer than 2 examples, or a bandwidth is not above 0.

    Source: Gretton et al., JMLR 2012, lemma 6; several bandwidths: Long et al., ICML 2015.
    """
    _check(source, target)
    if not bandwidths or min(bandwidths) <= 0 or (unit is not None and unit <= 0):
        raise ValueError(f"bandwidths are {tuple(bandwidths)} and unit is {unit}; numbers above 0 are needed")
    with torch.autocast(source.device.type, enabled=False):
        source, target = wide(source), wide(target)
        distances = [_squared_distances(*pair) for pair in ((source, source), (target, target), (source, target))]
        squared_unit = _mean_squared_distance(*distances) if unit is None else unit**2
        within_s, within_t, between = (
            torch.stack([torch.exp(-d / (2 * w**2 * squared_unit)) for w in bandwidths]).mean(0) for d in distances
        )
        return _mean_of_others(within_s) + _mean_of_others(within_t) - 2 * between.mean()


def _covariance(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return x.T @ x / (len(x) - 1)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    # not by x y^T: of features that are almost equal it would leave rounding errors, and their gradients
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _mean_squared_distance(within_s: Tensor, within_t: Tensor, between: Tensor) -> Tensor:
    """Over all pairs of two different examples; 1 where all are equal."""
    n = len(within_s) + len(within_t)
    mean = (within_s.sum() + within_t.sum() + 2 * between.sum()).detach() / (n * (n - 1))
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def _mean_of_others(kernel: Tensor) -> Tensor:
    """The mean without the diagonal."""
    n = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))


def _check(source: Tensor, target: Tensor) -> None:
    shapes = f"source has the shape {tuple(source.shape)} and target {tuple(target.shape)}"
    if source.dim() != 2 or target.dim() != 2 or source.size(1) != target.size(1) or not source.size(1):
        raise ValueError(f"{shapes}; (examples, features) with equal features are needed")
    if min(len(source), len(target)) < 2:
        raise ValueError(f"{shapes}; at least 2 examples each are needed")
