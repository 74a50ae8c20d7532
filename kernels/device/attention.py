"""relu2_attention and attention in Triton: one forward kernel, two rules for weights.

One pass over the sources. ReLU²: acc += r² V and Z += sum r², no row maximum, no exponential; out = acc / (Z + eps).
Softmax: the same with exp(s - peak) in the place of r², where peak is the row's largest score so far; a larger one
scales acc and Z down.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import LOG2_E, bias_of_rows, exponentials, scores
from .tiles import (
    SMALLEST,
    add_product,
    at,
    batch_index,
    find_sequence,
    in_units,
    inverse_denominator,
    kept,
    load_tile,
    mark_tile,
    sequence_bounds,
    store_rows,
    store_tile,
    tile_number,
    walk_sources,
)


@triton.jit
def attend(
    query,
    key,
    value,  # None: only the statistics are wanted
    bias,
    mask,
    active,
    lists,
    seed,
    i0,  # the batch-head, also as a flat number for dropout
    i1,
    i2,
    n,
    row0,  # where its targets and sources begin, if packed
    column0,
    tile,
    features,  # first of the value's columns
    T,
    S,
    diagonal,
    scale,
    threshold,
    WIDTH: tl.constexpr,
    CHECK_T: tl.constexpr,
    FEATURES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    FOLDED: tl.constexpr,
    SCALED: tl.constexpr,
    FLAG_ROWS: tl.constexpr,
    FLAG_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """For M targets and F + G of the value's columns: (sum of weights times value [M, F], the same [M, G] of the
    columns beside it, their unit, sum of weights, softmax's highest score and reference)."""
    row = tile * M
    q = load_tile(query, at(query, i0, i1, i2, row0 + row), T - row, WIDTH, M, E, CHECK_T, E != WIDTH, WIDE)
    key_base = at(key, i0, i1, i2, column0)
    value_base = at(value, i0, i1, i2, column0) + features.to(tl.int64) * value.column if value is not None else None
    lists_base = at(lists, i0, i1, i2, tile) if lists is not None else None
    bias_base = at(bias, i0, i1, i2, row0 + row) + column0.to(tl.int64) * bias.column if bias is not None else None
    mask_base = at(mask, i0, i1, i2, row) if mask is not None else None
    bias_rows = bias_of_rows(bias, bias_base, T - row, BIAS, M, CHECK_T, WIDE)
    walk = walk_sources(lists, lists_base, row, T, S, diagonal, M, N, CAUSAL, MASK)

    acc = tl.zeros([M, F], tl.float32)
    rest = tl.zeros([M, G if G else 1], tl.float32)
    z = tl.zeros([M], tl.float32)
    unit = tl.full([M], SMALLEST, tl.float32)
    highest = tl.full([M], float("-inf"), tl.float32)
    reference = tl.zeros([M], tl.float32)  # highest, or 0 where nothing may be read yet
    for PARTIAL in tl.static_range(2):
        for i in range(walk[2 * PARTIAL], walk[2 * PARTIAL + 1]):
            j = tile_number(lists, lists_base, i)
            column = (j * N).to(tl.int64)
            k = load_tile(key, key_base + column * key.row, S - j * N, WIDTH, N, E, PARTIAL, E != WIDTH, WIDE)
            p = scores(
                q, k, bias, bias_base, bias_rows, mask, mask_base, row, j * N, T, S, diagonal, scale,
                BIAS, MASK, CAUSAL, SCALE, SOFTMAX, PARTIAL, False, PRECISION, WIDE,
            )  # fmt: skip
            if SOFTMAX:
                largest = tl.max(p, 1) * (scale * LOG2_E) if FOLDED else tl.max(p, 1)
                higher = tl.maximum(highest, largest)
                reference = tl.where(higher == float("-inf"), 0.0, higher) if PARTIAL or BIAS != "none" else higher
                shrink = tl.exp2((highest - reference) * (1.0 if FOLDED else LOG2_E))
                p = exponentials(p, reference[:, None], scale, FOLDED)
                highest = higher
                z *= shrink
                acc *= shrink[:, None]
                rest *= shrink[:, None]
            else:
                p = p * p
            added = tl.sum(p, 1)
            z += added
            if value is not None:
                CHECK_F: tl.constexpr = FEATURES % (F + G) != 0 or FEATURES == 0
                base = value_base + column * value.row
                v = load_tile(value, base, S - j * N, FEATURES - features, N, F, PARTIAL, CHECK_F, WIDE)
                if seed is not None:
                    p = tl.where(kept(tl.load(seed), n, row + tl.arange(0, M), j * N, threshold, N), p, 0.0)
                if active is None:
                    if G:
                        base += tl.full([], F, tl.int64) * value.column
                        u = load_tile(value, base, S - j * N, FEATURES - features - F, N, G, PARTIAL, CHECK_F, WIDE)
                        rest, _ = add_product(rest, unit, p, u, SCALED, PRECISION)
                    acc, unit = add_product(acc, unit, p, v, SCALED, PRECISION)
                elif tl.sum(added, 0) != 0.0:
                    acc, unit = add_product(acc, unit, p, v, SCALED, PRECISION)
                    mark_tile(active, i0, i1, i2, tile, j, 2 - PARTIAL, FLAG_ROWS, FLAG_COLUMNS)

    return acc, rest, unit, z, highest, reference


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    bias,
    mask,
    out,  # result, None without a value
    normalizer,  # results, each may be None: Z, for softmax the sum of exp(s - peak)
    inverse,  # 1 / (Z + eps), 0 for a dead row
    lse,  # results of softmax, None for ReLU²: log of the sum of exp(s) ...
    peak,  # ... and the largest score (in powers of two where FOLDED)
    active,
    lists,
    cu_seqlens_q,
    cu_seqlens_k,
    seed,
    lead,
    T,
    S,
    sequences,
    tiles,
    diagonal,
    scale,
    eps,
    threshold,
    keep_scale,
    WIDTH: tl.constexpr,
    CHECK_T: tl.constexpr,
    FEATURES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    FOLDED: tl.constexpr,
    SCALED: tl.constexpr,
    FLAG_ROWS: tl.constexpr,
    FLAG_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: M targets of one batch-head times F + G of the value's columns; G is 0 where tiles are skipped."""
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest causal rows first
    n = tl.program_id(0) // tiles % lead[2]
    features = tl.program_id(0) // tiles // lead[2] * (F + G)
    i0, i1, i2 = batch_index(n, lead)
    row0, column0 = tile * 0, tile * 0
    if cu_seqlens_q is not None:
        sequence, tile = find_sequence(cu_seqlens_q, sequences, tile, M)
        row0, T = sequence_bounds(cu_seqlens_q, sequence, T)
        column0, S = sequence_bounds(cu_seqlens_k, sequence, S)
        n += sequence * lead[2]
    row = tile * M
    if (row < 0) | (row >= T):
        return

    SOFTMAX: tl.constexpr = peak is not None
    acc, rest, unit, z, highest, reference = attend(
        query, key, value, bias, mask, active, lists, seed, i0, i1, i2, n, row0, column0, tile, features,
        T, S, diagonal, scale, threshold, WIDTH, CHECK_T, FEATURES, M, N, E, F, G, BIAS, MASK, CAUSAL, SCALE,
        SOFTMAX, FOLDED, SCALED, FLAG_ROWS, FLAG_COLUMNS, PRECISION, WIDE,
    )  # fmt: skip
    left = T - row
    below = inverse_denominator(z, eps)
    if out is not None:
        factor = in_units(below, unit, query.pointer.dtype.element_ty, SCALED) * keep_scale
        out_base = at(out, i0, i1, i2, row0 + row) + features
        store_tile(out, out_base, acc * factor[:, None], left, FEATURES - features, WIDE)
        if G:
            store_tile(out, out_base + F, rest * factor[:, None], left, FEATURES - features - F, WIDE)
    if features == 0:
        if normalizer is not None:
            store_rows(normalizer, at(normalizer, i0, i1, i2, row0 + row), z, left)
        if inverse is not None:
            store_rows(inverse, at(inverse, i0, i1, i2, row0 + row), below, left)
        if SOFTMAX:
            log_sum = highest * (1.0 / LOG2_E if FOLDED else 1.0) + tl.log(tl.where(z == 0.0, 1.0, z))
            store_rows(lse, at(lse, i0, i1, i2, row0 + row), tl.where(z == 0.0, float("-inf"), log_sum), left)
            store_rows(peak, at(peak, i0, i1, i2, row0 + row), reference, left)
