"""What the blocked backends share: the walk over blocks of batch-heads and targets, and slices of tensors whose
leading dimensions broadcast.

A tile is a slice of the leading dimensions times a range of targets, with all the sources that these may read. Its
scores are the largest tensor alive: at most `TILE_ELEMENTS` numbers (one row of one batch-head, if that is more).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 19
"""Scores of a tile in numbers: 2 MiB in fp32, so that the passes over a tile stay in two cores' caches."""
MAX_ROWS = 100
"""Targets of a tile: few enough that causal tiles skip most of what lies above the diagonal."""

LeadSlice = tuple[slice, ...]


@dataclass(frozen=True)
class Tile:
    lead: LeadSlice  # one slice per leading dimension
    lead_shape: tuple[int, ...]  # sizes of these slices
    rows: slice  # targets
    sources: slice  # 0 .. one past the last source that any of the targets may read

    @property
    def at_rows(self) -> tuple[slice, ...]:
        """Index of the tile's targets in a tensor (lead..., T, ...)."""
        return (*self.lead, self.rows)

    @property
    def count(self) -> int:
        return math.prod(self.lead_shape)

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


def lead_slices(shape: Sequence[int], count: int) -> Iterator[LeadSlice]:
    """Slices that cover all of shape with at most max(count, 1) elements each: the last dimensions whole, one
    dimension in steps, the first ones singly."""
    if not shape:
        yield ()
        return
    step = min(shape[0], max(count // max(math.prod(shape[1:]), 1), 1))
    for start in range(0, shape[0], max(step, 1)):
        for rest in lead_slices(shape[1:], count):
            yield (slice(start, min(start + step, shape[0])), *rest)


def tiles(
    lead: Sequence[int], num_targets: int, num_sources: int, diagonal: int | None, per_pair: int = 1
) -> Iterator[list[Tile]]:
    """The tiles of (*lead, T, S), grouped: those of one list share their slice of the leading dimensions.

    per_pair is how many numbers the caller holds for every pair (the graphs of a mixture). Targets that may read
    no source at all are in no tile.
    """
    if 0 in lead or num_targets == 0 or num_sources == 0:
        return
    rows = max(min(num_targets, MAX_ROWS, TILE_ELEMENTS // (num_sources * per_pair)), 1)
    rows = math.ceil(num_targets / math.ceil(num_targets / rows))  # equal tiles
    count = max(TILE_ELEMENTS // (rows * num_sources * per_pair), 1)
    for index in lead_slices(lead, count):
        shape = tuple(s.stop - s.start for s in index)
        group = []
        for start in range(0, num_targets, rows):
            stop = min(start + rows, num_targets)
            end = num_sources if diagonal is None else min(max(stop + diagonal, 0), num_sources)
            if end > 0:
                group.append(Tile(index, shape, slice(start, stop), slice(0, end)))
        if group:
            yield group


def pad_lead(t: Tensor, rank: int, tail: int = 2) -> Tensor:
    """A view with exactly rank leading dimensions before the last `tail` ones (missing ones have size 1)."""
    missing = rank + tail - t.dim()
    return t[(None,) * missing] if missing > 0 else t


def take(t: Tensor, lead: LeadSlice, *tail: slice) -> Tensor:
    """The slice of a tensor with len(lead) leading dimensions; dimensions of size 1 broadcast and stay whole."""
    return t[tuple(s if size != 1 else slice(None) for s, size in zip((*lead, *tail), t.shape, strict=True))]


def take_flat(t: Tensor, tile: Tile, part: slice, dtype: torch.dtype) -> Tensor:
    """Rows `part` of (lead..., R, D) for the tile as a 3-D tensor (tile.count, len(part), D) of dtype."""
    piece = take(t, tile.lead, part, slice(None))
    return piece.expand(*tile.lead_shape, *piece.shape[-2:]).reshape(tile.count, *piece.shape[-2:]).to(dtype)


def add_to(total: Tensor, tile: Tile, tail: tuple[slice, ...], piece: Tensor) -> None:
    """total[tile] += piece, where piece (tile.count, ...) is summed over the dimensions that total broadcasts."""
    target = take(total, tile.lead, *tail)
    piece = piece.view(*tile.lead_shape, *piece.shape[1:])
    target.add_(piece if piece.shape == target.shape else piece.sum_to_size(target.shape))


def store(total: Tensor, tile: Tile, piece: Tensor) -> None:
    """total[tile rows] = piece, for totals that have every leading dimension whole."""
    target = total[tile.at_rows]
    target.copy_(piece.view(target.shape))


def batch_head_indices(lead: Sequence[int], device: torch.device) -> Tensor:
    """Flat index of every position of the leading dimensions (the n of the dropout counter)."""
    return torch.arange(math.prod(lead), device=device).view(tuple(lead))
