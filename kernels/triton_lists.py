"""Block states and tile lists on the host's side: see `glomo.kernels.device.lists`."""

from __future__ import annotations

import torch
from torch import Tensor

from .configurations import Configuration
from .launch import Launch, Lead, Operand, diagonal_within, is_wide

GRANULE = 32
"""Targets and sources of a block: every tile is a multiple of it ..."""
LARGEST_TILE = 128
"""... and at most this."""

_BUILDER = Configuration(0, 0, 0, 4, 1)


def blocks(size: int) -> int:
    """Blocks for `size` targets or sources, filled up so that the largest tiles are whole blocks."""
    return (size + LARGEST_TILE - 1) // LARGEST_TILE * (LARGEST_TILE // GRANULE)


def mask_states(lead: Lead, mask: Tensor, num_targets: int, num_sources: int, diagonal: int | None) -> Operand:
    """States (d0, d1, d2, blocks, blocks) of a bool mask; dimensions in which it broadcasts have size 1."""
    from .device.lists import block_states_kernel

    owns = lead.owns(mask)
    sizes = tuple(n if own else 1 for n, own in zip(lead.sizes, owns, strict=True))
    states = torch.zeros(*sizes, blocks(num_targets), blocks(num_sources), dtype=torch.int8, device=mask.device)
    result = _operand(states, owns)
    source = lead.operand(mask.view(torch.uint8))
    columns = (num_sources + GRANULE - 1) // GRANULE
    rows = (num_targets + GRANULE - 1) // GRANULE
    Launch(
        block_states_kernel,
        rows * columns * sizes[0] * sizes[1] * sizes[2],
        dict(
            mask=source,
            states=result,
            lead=sizes[1:],
            T=num_targets,
            S=num_sources,
            columns=columns,
            diagonal=diagonal_within(diagonal, num_targets, num_sources),
        ),
        dict(G=GRANULE, CAUSAL=diagonal is not None, WIDE=is_wide([source], GRANULE, GRANULE)),
        _BUILDER,
    ).run()
    return result


def tile_lists(states: Operand, rows: int, columns: int, tile_rows: int, tile_columns: int) -> Operand:
    """Lists (d0, d1, d2, tiles, 2 + tiles) of a kernel whose tiles are tile_rows x tile_columns, over its rows.

    rows and columns are the targets and sources; for a kernel that walks the targets, both states and numbers come
    transposed.
    """
    from .device.lists import tile_lists_kernel

    sizes = tuple(states.pointer.shape[:3])
    tiles = (rows + tile_rows - 1) // tile_rows
    capacity = (columns + tile_columns - 1) // tile_columns
    lists = torch.empty(*sizes, tiles, 2 + capacity, dtype=torch.int32, device=states.pointer.device)
    result = _operand(lists, tuple(stride != 0 for stride in (states.d0, states.d1, states.d2)))
    Launch(
        tile_lists_kernel,
        tiles * sizes[0] * sizes[1] * sizes[2],
        dict(
            states=states,
            lists=result,
            lead=sizes[1:],
            rows=blocks(rows),
            columns=blocks(columns),
            tiles=tiles,
            capacity=capacity,
        ),
        dict(ROWS=tile_rows // GRANULE, COLUMNS=tile_columns // GRANULE, CHUNK=128),
        _BUILDER,
    ).run()
    return result


def transposed(states: Operand) -> Operand:
    return states._replace(row=states.column, column=states.row)


def _operand(t: Tensor, owns: tuple[bool, ...]) -> Operand:
    d0, d1, d2 = (t.stride(d) if own else 0 for d, own in enumerate(owns))
    return Operand(t, d0, d1, d2, t.stride(3), t.stride(4))
