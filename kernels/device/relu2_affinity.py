"""The graph itself: one walk over the sources for Z, a second one that recomputes the squares and writes A."""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import bias_of_rows, scores
from .tiles import at, batch_index, inverse_denominator, load_tile, store_rows, store_tile, tile_number, walk_sources


@triton.jit
def affinity_kernel(
    query,
    key,
    bias,
    mask,
    affinity,
    normalizer,
    lead,
    T,
    S,
    tiles,
    diagonal,
    scale,
    eps,
    WIDTH: tl.constexpr,
    CHECK_T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: M rows of one graph, whole, with the zeros beyond the diagonal."""
    row = (tiles - 1 - tl.program_id(0) % tiles) * M
    i0, i1, i2 = batch_index(tl.program_id(0) // tiles, lead)
    q = load_tile(query, at(query, i0, i1, i2, row), T - row, WIDTH, M, E, CHECK_T, E != WIDTH, WIDE)
    key_base = at(key, i0, i1, i2, row * 0)
    result = at(affinity, i0, i1, i2, row)
    bias_base = at(bias, i0, i1, i2, row) if bias is not None else None
    mask_base = at(mask, i0, i1, i2, row) if mask is not None else None
    bias_rows = bias_of_rows(bias, bias_base, T - row, BIAS, M, CHECK_T, WIDE)
    _, whole, _, visited = walk_sources(None, None, row, T, S, diagonal, M, N, CAUSAL, MASK)

    z = tl.zeros([M], tl.float32)
    inverse = tl.zeros([M], tl.float32)
    for WRITE in tl.static_range(2):
        for PARTIAL in tl.static_range(2):
            for i in range(whole if PARTIAL else 0, visited if PARTIAL else whole):
                j = tile_number(None, None, i)
                base = key_base + (j * N).to(tl.int64) * key.row
                k = load_tile(key, base, S - j * N, WIDTH, N, E, PARTIAL, E != WIDTH, WIDE)
                r = scores(
                    q, k, bias, bias_base, bias_rows, mask, mask_base, row, j * N, T, S, diagonal, scale,
                    BIAS, MASK, CAUSAL, SCALE, False, PARTIAL, False, PRECISION, WIDE,
                )  # fmt: skip
                if WRITE:
                    store_tile(affinity, result + j * N, r * (r * inverse[:, None]), T - row, S - j * N, WIDE)
                else:
                    z += tl.sum(r * r, 1)
        if not WRITE:
            inverse = inverse_denominator(z, eps)
    for j in range(visited, tl.cdiv(S, N)):
        store_tile(affinity, result + j * N, tl.zeros([M, N], tl.float32), T - row, S - j * N, WIDE)
    store_rows(normalizer, at(normalizer, i0, i1, i2, row), z, T - row)
