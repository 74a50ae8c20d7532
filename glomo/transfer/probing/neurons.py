"""Single units of a layer: which of them go with a label, and what drives them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from glomo.transfer.probing.correlation import pearson, ranks, spearman


def unit_correlations(features: Tensor, labels: Tensor, method: Literal["pearson", "spearman"] = "pearson") -> Tensor:
    """The correlation (dim,) of every unit of the features with a label, in fp64; 0 where one of them is constant.

    Args:
        features: (N, dim).
        labels: (N,) numbers; booleans, such as `labels == 2`, give the point-biserial correlation with one class.
        method: Pearson's r, or Spearman's rho (of ranks).

    Raises:
        ValueError: there is not one label for each row, a number is not finite, or the method is unknown.

    Source: Radford et al., arXiv 1704.01444, and Dalvi et al., AAAI 2019, look at single units so.
    """
    if method not in ("pearson", "spearman"):
        raise ValueError(f"method is {method!r}; pearson or spearman is needed")
    return (pearson if method == "pearson" else spearman)(features, torch.as_tensor(labels, device=features.device))


def top_units(correlations: Tensor, count: int = 10) -> list[tuple[int, float]]:
    """(unit, correlation) of the largest absolute correlations; of equal ones the first unit comes first.

    Raises:
        ValueError: the correlations are not (dim,), or count is negative.
    """
    if correlations.dim() != 1 or count < 0:
        raise ValueError(f"the correlations are {tuple(correlations.shape)} and count {count}; (dim,), and 0 or more")
    order = correlations.abs().argsort(descending=True, stable=True)[:count].tolist()
    return [(unit, float(correlations[unit])) for unit in order]


def top_examples(features: Tensor, unit: int, count: int = 10) -> list[tuple[int, float]]:
    """(row, activation) of the largest activations of a unit of features (N, dim); of equal ones the first row first.

    Raises:
        ValueError: there is no such unit, or count is negative.
    """
    if features.dim() != 2 or not 0 <= unit < features.size(1) or count < 0:
        raise ValueError(
            f"unit is {unit} and count {count} for features {tuple(features.shape)}; (N, dim) has the unit"
        )
    order = features[:, unit].argsort(descending=True, stable=True)[:count].tolist()
    return [(row, float(features[row, unit])) for row in order]


def mutual_information(features: Tensor, labels: Tensor, bins: int = 8) -> Tensor:
    """Mutual information (dim,) in nats of every unit, cut into quantiles, with a class, in fp64:

    .. code-block:: text

        sum_{b, c} p(b, c) log(p(b, c) / (p(b) p(c)))

    Equal activations are in one bin. It sees what is not monotonous, and with few rows it is biased upwards.

    Args:
        features: (N, dim).
        labels: (N,) whole numbers from 0 on.
        bins: how many quantiles.

    Raises:
        ValueError: there is not one label for each row, a label is negative, or bins is below 1.
    """
    labels = torch.as_tensor(labels, device=features.device).long()
    if (
        features.dim() != 2
        or labels.shape != features.shape[:1]
        or not len(labels)
        or int(labels.min()) < 0
        or bins < 1
    ):
        raise ValueError(
            f"the features are {tuple(features.shape)}, the labels {tuple(labels.shape)} and bins {bins}; (N, dim), "
            "(N,) whole numbers from 0 on, and at least 1 are needed"
        )
    count, dim, classes = len(labels), features.size(1), int(labels.max()) + 1
    place = ((ranks(features) * bins / count).ceil().long() - 1).clamp(0, bins - 1)
    cell = (torch.arange(dim, device=place.device) * bins + place) * classes + labels[:, None]
    p = cell.flatten().bincount(minlength=dim * bins * classes).view(dim, bins, classes).double() / count
    expected = p.sum(2, keepdim=True) * p.sum(1, keepdim=True)
    return torch.where(p > 0, p * (p / expected.clamp(min=1e-300)).log(), 0.0).sum((1, 2))
