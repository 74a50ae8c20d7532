"""Which tiles a kernel visits, where a mask or a positive score decides: states of small blocks, and lists made of
them.

A block of GRANULE x GRANULE pairs is empty (0), mixed (1) or whole (2). A tile of a kernel is some blocks; a list row
holds (number of whole tiles, number of tiles, the whole ones, the mixed ones): only mixed tiles look at masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import at, batch_index, offsets


@triton.jit
def block_states_kernel(
    mask,
    states,  # result
    lead,
    T,
    S,
    columns,  # blocks in a row of states
    diagonal,
    G: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: the state of one block, from a mask, the diagonal and the last source."""
    j = tl.program_id(0) % columns
    rows = tl.cdiv(T, G)
    i = tl.program_id(0) // columns % rows
    i0, i1, i2 = batch_index(tl.program_id(0) // columns // rows, lead)
    t, s = i * G + tl.arange(0, G)[:, None], j * G + tl.arange(0, G)[None, :]
    inside = (t < T) & (s < S)
    base = at(mask, i0, i1, i2, i * G) + (j * G).to(tl.int64) * mask.column
    allowed = tl.load(base + offsets(mask, G, G, WIDE), inside, other=0) != 0
    if CAUSAL:
        allowed = allowed & (s <= t + diagonal)
    # a target beyond the last one takes nothing away from a whole block; a source does: its key is read as 0
    whole = tl.min(tl.min((allowed | (t >= T)).to(tl.int32), 1), 0)
    some = tl.max(tl.max(allowed.to(tl.int32), 1), 0)
    tl.store(at(states, i0, i1, i2, i) + j, (some + whole * some).to(tl.int8))


@triton.jit
def tile_lists_kernel(
    states,
    lists,  # result
    lead,
    rows,  # blocks
    columns,
    tiles,  # rows of lists
    capacity,  # tiles in a row
    ROWS: tl.constexpr,  # blocks in a tile
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one row of lists."""
    tile = tl.program_id(0) % tiles
    i0, i1, i2 = batch_index(tl.program_id(0) // tiles, lead)
    base = at(states, i0, i1, i2, tile * ROWS)
    result = at(lists, i0, i1, i2, tile)
    found = tile * 0
    whole = found
    for WANTED in tl.static_range(2):
        for first in range(0, capacity, CHUNK):
            j = first + tl.arange(0, CHUNK)
            some, every = tl.zeros([CHUNK], tl.int32), tl.full([CHUNK], 2, tl.int32)
            for r in tl.static_range(ROWS):
                for c in tl.static_range(COLUMNS):
                    column = j * COLUMNS + c
                    inside = (tile * ROWS + r < rows) & (column < columns)
                    state = tl.load(base + r * states.row + column * states.column, inside, other=0).to(tl.int32)
                    some, every = tl.maximum(some, state), tl.minimum(every, state)
            if WANTED == 0:
                chosen = (every == 2).to(tl.int32)
            else:
                chosen = ((some > 0) & (every < 2)).to(tl.int32)
            place = found + tl.cumsum(chosen, 0) - 1
            tl.store(result + 2 + place, j, chosen != 0)
            found += tl.sum(chosen, 0)
        if WANTED == 0:
            whole = found
    tl.store(result, whole)
    tl.store(result + 1, found)
