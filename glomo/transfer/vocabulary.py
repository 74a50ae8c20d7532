"""Weights by unit, carried over to another vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glomo.nn.embedded import PAD
from glomo.nn.precision import at_least_fp32


class Overlap(NamedTuple):
    """How many units of the new vocabulary, padding left out, are of the old one too."""

    shared: int
    new: int


def overlap(old_units: Sequence[str], new_units: Sequence[str]) -> Overlap:
    """Units by id, padding first."""
    old = set(old_units[PAD + 1 :])
    shared = sum(unit in old for unit in new_units[PAD + 1 :])
    return Overlap(shared, max(len(new_units) - 1, 0) - shared)


def converted_rows(weight: Tensor, old_units: Sequence[str], new_units: Sequence[str]) -> Tensor:
    """The rows of `weight` (V_old, ...) in the order of another vocabulary, (V_new, ...):

    .. code-block:: text

        row of a unit that both have: the old row,    of a new unit: the mean of all old rows but padding's

    The row of padding (id 0) is zero, or the old one if `weight` is a bias. Only names count: a unit that the model has
    added (the last, which ends texts) is carried over if both sequences end in the same name for it.

    Args:
        weight: (V_old, dim), or a bias (V_old,).
        old_units: names of the rows, by id; padding is the first.
        new_units: names of the new rows.

    Raises:
        ValueError: there is not one name for each of the rows, no row but padding's, or a name stands for two rows.

    Source: Howard and Ruder, ACL 2018: the published scripts.
    """
    if len(old_units) != len(weight) or len(weight) < 2:
        raise ValueError(f"{len(weight)} rows have {len(old_units)} names; one each is needed, and at least 2 rows")
    if not new_units:
        raise ValueError("the new vocabulary has no unit; it needs padding at least")
    rows = {unit: row for row, unit in enumerate(old_units) if row != PAD}
    if len(rows) != len(old_units) - 1:
        twice = next(unit for row, unit in enumerate(old_units) if row != PAD and rows[unit] != row)
        raise ValueError(f"the name {twice!r} stands for two of the rows; one each is needed")
    weight = weight.detach()
    mean = weight[PAD + 1 :].mean(0, dtype=at_least_fp32(weight.dtype)).to(weight.dtype)
    # the mean is one more row behind the old ones
    sources = [PAD, *(rows.get(unit, len(weight)) for unit in new_units[PAD + 1 :])]
    converted = torch.cat([weight, mean[None]])[torch.tensor(sources, device=weight.device)]
    if weight.dim() > 1:
        converted[PAD] = 0
    return converted
