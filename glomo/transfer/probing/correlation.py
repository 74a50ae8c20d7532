"""Correlation of numbers, and of their ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(x: Tensor) -> Tensor:
    """Ranks from 1 along the first dimension, (N,) or (N, D); equal numbers share the mean of their ranks. fp64.

    Raises:
        ValueError: a number is not finite, or there are more than two dimensions.
    """
    _check(x)
    columns = x.detach().reshape(len(x), -1).double().T.contiguous()
    ordered = columns.sort(-1).values
    below = torch.searchsorted(ordered, columns)
    up_to = torch.searchsorted(ordered, columns, right=True)
    return ((below + up_to + 1).double() / 2).T.reshape(x.shape)


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of every column of x (N,) or (N, D) with y (N,), () or (D,), in fp64:

    .. code-block:: text

        r = sum_n (x_n - mean x) (y_n - mean y) / sqrt(sum_n (x_n - mean x)^2 sum_n (y_n - mean y)^2)

    It is 0 where x or y is constant. With y of zeros and ones it is the point-biserial correlation.

    Raises:
        ValueError: a number is not finite; y is not one number for each row of x; there are fewer than two.
    """
    _check(x)
    _check(y)
    if y.dim() != 1 or len(y) != len(x) or len(y) < 2:
        raise ValueError(f"x is {tuple(x.shape)} and y {tuple(y.shape)}; (N, D) or (N,), and (N,), of at least 2 rows")
    a, b = x.detach().reshape(len(x), -1).double(), y.detach().double()[:, None]
    constant = (a.amax(0) == a.amin(0)) | (b.amax(0) == b.amin(0))
    a, b = a - a.mean(0), b - b.mean(0)
    # scaled first: squares of very small or large numbers would leave fp64's range
    a, b = (v / v.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny) for v in (a, b))
    r = (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=torch.finfo(torch.float64).tiny)
    return r.masked_fill(constant, 0).clamp(-1, 1).reshape(x.shape[1:])


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rho: `pearson` of the `ranks`. Raises as they do."""
    return pearson(ranks(x), ranks(y))


def _check(x: Tensor) -> None:
    if x.dim() not in (1, 2):
        raise ValueError(f"the numbers are {tuple(x.shape)}; (N,) or (N, D) is needed")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise ValueError(f"{int((~x.isfinite()).sum())} of the {x.numel()} numbers are not finite; all must be")
