"""The gradient kernels of relu2_attention, relu2_affinity and attention in Triton: no atomics, one owner for every
number.

With g[t, j] = dP[t, j] - delta[t] + dZ[t] (Z[t] + eps), where dP = dout V^T (relu2_affinity: dP = dA), the score's
gradient is ds = 2 r g / (Z + eps). For softmax ds = P g with g = dP - delta + dlse and P = exp(s - peak) / Z, where Z
is the sum of the exponentials, eps is 0 and dlse stands in the place of dZ Z.

A kernel over blocks of targets sums dquery and the gradient of a bias per target, one over blocks of sources dkey,
dvalue and the gradient of a bias per source, and one over tiles the gradient of a full bias.

delta[t] = sum_j A[t, j] dP[t, j]. The usual short cut <out, dout> is only as exact as the rounded out, which is far too
little where dP and delta nearly cancel (a row with one source) and Z is small. So the first kernel starts from the
short cut, sums in fp32 what is missing while it walks, and walks its rows once more where that changes them by more
than a rounding of their own; the other kernels get the exact value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import bias_of_rows, load_peaks, slopes
from .tiles import (
    SMALLEST,
    add_product,
    at,
    batch_index,
    find_sequence,
    in_units,
    inverse_denominator,
    kept,
    load_rows,
    load_tile,
    product,
    sequence_bounds,
    store_rows,
    store_tile,
    tile_number,
    walk_sources,
    walk_targets,
)


@triton.jit
def weight_gradients(
    do,  # [M, F] and [N, F], the tiles of dout and value where these are no wider than F
    v,
    dout,
    dout_base,  # at the tile's first target
    value,  # None: dout is the gradient of the affinity itself
    value_base,
    row,
    column,
    T,
    S,
    FEATURES: tl.constexpr,
    CHECK_T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    F: tl.constexpr,
    CHECK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dP [M, N] or its transpose [N, M] in fp32, before dropout and a factor of the rows."""
    if value is None:
        base = dout_base + column.to(tl.int64) * dout.column
        dp = load_tile(dout, base, T - row, S - column, M, N, True, True, WIDE).to(tl.float32)
        return tl.trans(dp) if TRANSPOSED else dp
    elif FEATURES <= F:
        return product(v, tl.trans(do), None, PRECISION) if TRANSPOSED else product(do, tl.trans(v), None, PRECISION)
    else:
        base = value_base + column.to(tl.int64) * value.row
        dp = tl.zeros([N, M] if TRANSPOSED else [M, N], tl.float32)
        for first in range(0, FEATURES, F):
            left, wide = FEATURES - first, tl.cast(first, tl.int64)
            b = load_tile(value, base + wide * value.column, S - column, left, N, F, CHECK, True, WIDE)
            a = load_tile(dout, dout_base + wide * dout.column, T - row, left, M, F, CHECK_T, True, WIDE)
            if TRANSPOSED:
                dp = product(b, tl.trans(a), dp, PRECISION)
            else:
                dp = product(a, tl.trans(b), dp, PRECISION)
        return dp


@triton.jit
def targets_kernel(
    query,
    key,
    value,
    bias,
    mask,
    out,
    dout,
    factors,  # of the rows of dout, or None
    normalizer,  # None where `inverse` is given
    dnormalizer,  # dZ, for softmax dlse, or None
    peak,  # for softmax, else None
    delta,  # given, or None
    shift,  # result: delta - dZ (Z + eps), fp32; None where delta is exact
    inverse,  # result, or given: 1 / (Z + eps), fp32
    dquery,  # result, or None
    dbias,  # result per target in fp32, or None
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
    FEATURES: tl.constexpr,
    CHECK_T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    FOLDED: tl.constexpr,
    SCALED: tl.constexpr,
    TOLERANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: M targets of one batch-head."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    n = tl.program_id(0) // tiles
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

    q = load_tile(query, at(query, i0, i1, i2, row0 + row), T - row, WIDTH, M, E, CHECK_T, E != WIDTH, WIDE)
    key_base = at(key, i0, i1, i2, column0)
    value_base = at(value, i0, i1, i2, column0) if value is not None else None
    dout_base = at(dout, i0, i1, i2, row0 + row)
    lists_base = at(lists, i0, i1, i2, tile) if lists is not None else None
    bias_base = at(bias, i0, i1, i2, row0 + row) + column0.to(tl.int64) * bias.column if bias is not None else None
    mask_base = at(mask, i0, i1, i2, row) if mask is not None else None
    bias_rows = bias_of_rows(bias, bias_base, T - row, BIAS, M, CHECK_T, WIDE)
    walk = walk_sources(lists, lists_base, row, T, S, diagonal, M, N, CAUSAL, MASK)

    SOFTMAX: tl.constexpr = peak is not None
    EXACT: tl.constexpr = shift is None
    CHECK_F: tl.constexpr = FEATURES % F != 0 or FEATURES == 0
    from_z = tl.zeros([M], tl.float32)
    if normalizer is None:
        below = load_rows(inverse, at(inverse, i0, i1, i2, row0 + row), T - row, M, CHECK_T, WIDE)
    else:
        z = load_rows(normalizer, at(normalizer, i0, i1, i2, row0 + row), T - row, M, CHECK_T, WIDE)
        below = inverse_denominator(z, eps)
        if dnormalizer is not None:
            dz = load_rows(dnormalizer, at(dnormalizer, i0, i1, i2, row0 + row), T - row, M, CHECK_T, WIDE)
            from_z = tl.where(z == 0.0, 0.0, dz) if SOFTMAX else dz * (z + eps)
    peaks = below  # not used, but for softmax
    if SOFTMAX:
        peaks = load_peaks(peak, at(peak, i0, i1, i2, row0 + row), T - row, M, CHECK_T, WIDE)
    factor = tl.full([M], 1.0, tl.float32)
    if factors is not None:
        factor = load_rows(factors, at(factors, i0, i1, i2, row0 + row), T - row, M, CHECK_T, WIDE)
    do = q  # not used, unless the value is narrow enough to keep its tile
    if value is not None and FEATURES <= F:
        do = load_tile(dout, dout_base, T - row, FEATURES, M, F, CHECK_T, CHECK_F, WIDE)
    g0 = tl.zeros([M], tl.float32)
    if delta is not None:
        g0 = load_rows(delta, at(delta, i0, i1, i2, row0 + row), T - row, M, CHECK_T, WIDE)
    elif out is not None:
        out_base = at(out, i0, i1, i2, row0 + row)
        if FEATURES <= F:
            o = load_tile(out, out_base, T - row, FEATURES, M, F, CHECK_T, CHECK_F, WIDE)
            g0 = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        else:
            for first in range(0, FEATURES, F):
                left = FEATURES - first
                d_base = dout_base + tl.cast(first, tl.int64) * dout.column
                o_base = out_base + tl.cast(first, tl.int64) * out.column
                d = load_tile(dout, d_base, T - row, left, M, F, CHECK_T, CHECK_F, WIDE)
                o = load_tile(out, o_base, T - row, left, M, F, CHECK_T, CHECK_F, WIDE)
                g0 += tl.sum(o.to(tl.float32) * d.to(tl.float32), 1)
        g0 = g0 * factor
    g0 = g0 - from_z

    acc = tl.zeros([M, E], tl.float32)
    unit = tl.full([M], SMALLEST, tl.float32)
    sums = tl.zeros([M], tl.float32)
    walks = 1
    while walks > 0:
        acc = tl.zeros([M, E], tl.float32)
        unit = tl.full([M], SMALLEST, tl.float32)
        sums = tl.zeros([M], tl.float32)
        total = tl.zeros([M], tl.float32)
        moment = tl.zeros([M], tl.float32)
        spread = tl.zeros([M], tl.float32)
        for PARTIAL in tl.static_range(2):
            for i in range(walk[2 * PARTIAL], walk[2 * PARTIAL + 1]):
                j = tile_number(lists, lists_base, i)
                column = j * N
                k_base = key_base + column.to(tl.int64) * key.row
                k = load_tile(key, k_base, S - column, WIDTH, N, E, PARTIAL, E != WIDTH, WIDE)
                r = slopes(
                    q, k, bias, bias_base, bias_rows, mask, mask_base, peaks, row, column, T, S, diagonal, scale,
                    BIAS, MASK, CAUSAL, SCALE, SOFTMAX, FOLDED, PARTIAL, False, PRECISION, WIDE,
                )  # fmt: skip
                v = k
                if value is not None and FEATURES <= F:
                    v_base = value_base + column.to(tl.int64) * value.row
                    v = load_tile(value, v_base, S - column, FEATURES, N, F, PARTIAL, CHECK_F, WIDE)
                dp = weight_gradients(
                    do, v, dout, dout_base, value, value_base, row, column, T, S,
                    FEATURES, CHECK_T, M, N, F, PARTIAL, False, PRECISION, WIDE,
                )  # fmt: skip
                if factors is not None:
                    dp = dp * factor[:, None]
                if seed is not None:
                    keep = kept(tl.load(seed), n, row + tl.arange(0, M), column, threshold, N)
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                g = dp - g0[:, None]
                ds = r * g
                if not EXACT:
                    pg = ds if SOFTMAX else r * ds
                    moment += tl.sum(pg, 1)
                    spread += tl.sum(tl.abs(pg), 1)
                if dbias is not None:
                    sums += tl.sum(ds, 1)
                    total += tl.sum(r, 1)
                if dquery is not None:
                    acc, unit = add_product(acc, unit, ds, k, SCALED, PRECISION)
        if EXACT:
            walks = 0
        else:
            correction = below * (moment - g0 * eps) - from_z
            g0 += correction
            sums -= correction * total  # exact at no cost: an fp32 bias expects fp32's digits
            wrong = (tl.abs(correction) > TOLERANCE * below * spread).to(tl.int32)
            walks = tl.where(walks == 1, tl.max(wrong, 0) * 2, 0)
    if shift is not None:
        store_rows(shift, at(shift, i0, i1, i2, row0 + row), g0, T - row)
    if normalizer is not None:
        store_rows(inverse, at(inverse, i0, i1, i2, row0 + row), below, T - row)
    if dquery is not None:
        factor = in_units(below, unit, q.dtype, SCALED) * (scale if SOFTMAX else 2.0 * scale)
        store_tile(dquery, at(dquery, i0, i1, i2, row0 + row), acc * factor[:, None], T - row, WIDTH, WIDE)
    if dbias is not None:
        factor = below if SOFTMAX else 2.0 * below
        store_rows(dbias, at(dbias, i0, i1, i2, row0 + row), factor * sums, T - row)


@triton.jit
def sources_kernel(
    query,
    key,
    value,
    bias,
    mask,
    dout,
    factors,
    peak,  # for softmax, else None
    inverse,
    shift,
    dkey,  # results, or None
    dvalue,
    dbias,  # result per source in fp32, or None
    lists,
    cu_seqlens_q,
    cu_seqlens_k,
    seed,
    lead,
    kept_lead,  # (d1, d2) of the batches that own a key or a value ...
    repeats,  # ... and (d0, d1, d2) of those that share one: each program adds up over them
    T,
    S,
    sequences,
    tiles,
    diagonal,
    scale,
    threshold,
    keep_scale,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    CHECK_T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    FOLDED: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: N sources of one key head, and F columns of its value where dkey is not wanted."""
    tile = tl.program_id(0) % tiles
    owner = tl.program_id(0) // tiles % kept_lead[2]
    features = tl.program_id(0) // tiles // kept_lead[2] * F
    k0, k1, k2 = batch_index(owner, kept_lead)
    row0, column0, first_n = tile * 0, tile * 0, tile * 0
    if cu_seqlens_q is not None:
        sequence, tile = find_sequence(cu_seqlens_k, sequences, tile, N)
        row0, T = sequence_bounds(cu_seqlens_q, sequence, T)
        column0, S = sequence_bounds(cu_seqlens_k, sequence, S)
        first_n = sequence * lead[2]
    column = tile * N
    if (column < 0) | (column >= S):
        return

    SCORES: tl.constexpr = dkey is not None or dbias is not None
    SOFTMAX: tl.constexpr = peak is not None
    CHECK_F: tl.constexpr = FEATURES % F != 0 or FEATURES == 0
    k = load_tile(key, at(key, k0, k1, k2, column0 + column), S - column, WIDTH, N, E, True, E != WIDTH, WIDE)
    v = k
    if value is not None and FEATURES <= F:
        v = load_tile(value, at(value, k0, k1, k2, column0 + column), S - column, FEATURES, N, F, True, CHECK_F, WIDE)
    dk = tl.zeros([N, E], tl.float32)
    dv = tl.zeros([N, F], tl.float32)
    sums = tl.zeros([N], tl.float32)
    unit_k = tl.full([N], SMALLEST, tl.float32)
    unit_v = tl.full([N], SMALLEST, tl.float32)
    for repeat in range(repeats[0] * repeats[1] * repeats[2]):
        r0, r1, r2 = batch_index(repeat, (repeats[1], repeats[2]))
        i0, i1, i2 = k0 + r0, k1 + r1, k2 + r2
        n = (i0 * lead[0] + i1) * lead[1] + i2 + first_n
        query_base = at(query, i0, i1, i2, row0)
        dout_base = at(dout, i0, i1, i2, row0) + features.to(tl.int64) * dout.column
        value_base = at(value, i0, i1, i2, column0) if value is not None else None
        peak_base = at(peak, i0, i1, i2, row0) if SOFTMAX else None
        factors_base = at(factors, i0, i1, i2, row0) if factors is not None else None
        inverse_base = at(inverse, i0, i1, i2, row0)
        shift_base = at(shift, i0, i1, i2, row0) if SCORES else None
        bias_start = at(bias, i0, i1, i2, row0) + column0.to(tl.int64) * bias.column if bias is not None else None
        mask_start = at(mask, i0, i1, i2, row0) if mask is not None else None
        lists_base = at(lists, i0, i1, i2, tile) if lists is not None else None
        walk = walk_targets(lists, lists_base, column, T, diagonal, M, N, CAUSAL, MASK)
        for PARTIAL in tl.static_range(2):
            # the few partial tiles are not pipelined where registers are short
            first, last = walk[2 * PARTIAL], walk[2 * PARTIAL + 1]
            for i in tl.range(first, last, num_stages=1 if PARTIAL and E + F > 128 else None):
                row = tile_number(lists, lists_base, i) * M
                start = row.to(tl.int64)
                q = load_tile(query, query_base + start * query.row, T - row, WIDTH, M, E, CHECK_T, E != WIDTH, WIDE)
                bias_base = bias_start + start * bias.row if bias is not None else None
                mask_base = mask_start + start * mask.row if mask is not None else None
                bias_rows = bias_of_rows(bias, bias_base, T - row, BIAS, M, CHECK_T, WIDE)
                below = load_rows(inverse, inverse_base + start * inverse.row, T - row, M, CHECK_T, WIDE)
                peaks = below  # not used, but for softmax
                if SOFTMAX:
                    peaks = load_peaks(peak, peak_base + start * peak.row, T - row, M, CHECK_T, WIDE)
                r = slopes(
                    q, k, bias, bias_base, bias_rows, mask, mask_base, peaks, row, column, T, S, diagonal, scale,
                    BIAS, MASK, CAUSAL, SCALE, SOFTMAX, FOLDED, PARTIAL, True, PRECISION, WIDE,
                )  # fmt: skip
                normalised = r * below[None, :]
                factor = below  # not used, but for rows with factors
                if factors is not None:
                    factor = load_rows(factors, factors_base + start * factors.row, T - row, M, CHECK_T, WIDE)
                do = q
                if (value is not None and FEATURES <= F) or dvalue is not None:
                    do_base = dout_base + start * dout.row
                    do = load_tile(dout, do_base, T - row, FEATURES - features, M, F, CHECK_T, CHECK_F, WIDE)
                if seed is not None:
                    keep = tl.trans(kept(tl.load(seed), n, row + tl.arange(0, M), column, threshold, N))
                if dvalue is not None:
                    p = normalised if SOFTMAX else r * normalised
                    if factors is not None:
                        p = p * factor[None, :]
                    if seed is not None:
                        p = tl.where(keep, p, 0.0)
                    dv, unit_v = add_product(dv, unit_v, p, do, SCALED, PRECISION)
                if SCORES:
                    dp = weight_gradients(
                        do, v, dout, dout_base + start * dout.row, value, value_base, row, column, T, S,
                        FEATURES, CHECK_T, M, N, F, True, True, PRECISION, WIDE,
                    )  # fmt: skip
                    if factors is not None:
                        dp = dp * factor[None, :]
                    if seed is not None:
                        dp = tl.where(keep, dp * keep_scale, 0.0)
                    g0 = load_rows(shift, shift_base + start * shift.row, T - row, M, CHECK_T, WIDE)
                    ds = normalised * (dp - g0[None, :])
                    if dbias is not None:
                        sums += tl.sum(ds, 1)
                    if dkey is not None:
                        dk, unit_k = add_product(dk, unit_k, ds, q, SCALED, PRECISION)

    left = S - column
    DOUBLED: tl.constexpr = 1.0 if SOFTMAX else 2.0
    if dkey is not None:
        factor = in_units(tl.full([N], DOUBLED, tl.float32) * scale, unit_k, k.dtype, SCALED)
        store_tile(dkey, at(dkey, k0, k1, k2, column0 + column), dk * factor[:, None], left, WIDTH, WIDE)
    if dvalue is not None:
        factor = in_units(tl.full([N], 1.0, tl.float32) * keep_scale, unit_v, k.dtype, SCALED)
        base = at(dvalue, k0, k1, k2, column0 + column) + features
        store_tile(dvalue, base, dv * factor[:, None], left, FEATURES - features, WIDE)
    if dbias is not None:
        store_rows(dbias, at(dbias, k0, k1, k2, column0 + column), DOUBLED * sums, left)


@triton.jit
def pairs_kernel(
    query,
    key,
    value,
    bias,
    mask,
    dout,
    factors,
    peak,  # for softmax, else None
    inverse,
    shift,
    dbias,  # result, every pair
    seed,
    lead,
    kept_lead,
    repeats,
    T,
    S,
    tiles,
    diagonal,
    scale,
    threshold,
    keep_scale,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    CHECK_T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: a tile [M, N] of the gradient of a full bias, added up over the batches that share it."""
    column = tl.program_id(0) % tiles * N
    row_tiles = tl.cdiv(T, M)
    row = tl.program_id(0) // tiles % row_tiles * M
    k0, k1, k2 = batch_index(tl.program_id(0) // tiles // row_tiles, kept_lead)
    left = T - row
    SOFTMAX: tl.constexpr = peak is not None
    total = tl.zeros([M, N], tl.float32)
    visited = repeats[0] * repeats[1] * repeats[2]
    if CAUSAL:
        visited = tl.where(row + M - 1 + diagonal < column, 0, visited)
    for repeat in range(visited):
        r0, r1, r2 = batch_index(repeat, (repeats[1], repeats[2]))
        i0, i1, i2 = k0 + r0, k1 + r1, k2 + r2
        q = load_tile(query, at(query, i0, i1, i2, row), left, WIDTH, M, E, CHECK_T, E != WIDTH, WIDE)
        k = load_tile(key, at(key, i0, i1, i2, column), S - column, WIDTH, N, E, True, E != WIDTH, WIDE)
        mask_base = at(mask, i0, i1, i2, row) if mask is not None else None
        no_rows = tl.zeros([M], tl.float32)
        peaks = no_rows
        if SOFTMAX:
            peaks = load_peaks(peak, at(peak, i0, i1, i2, row), left, M, CHECK_T, WIDE)
        r = slopes(
            q, k, bias, at(bias, i0, i1, i2, row), no_rows, mask, mask_base, peaks, row, column, T, S,
            diagonal, scale, BIAS, MASK, CAUSAL, SCALE, SOFTMAX, FOLDED, True, False, PRECISION, WIDE,
        )  # fmt: skip
        dout_base = at(dout, i0, i1, i2, row)
        value_base = at(value, i0, i1, i2, column * 0) if value is not None else None
        do, v = q, k
        if value is not None and FEATURES <= F:
            do = load_tile(dout, dout_base, left, FEATURES, M, F, CHECK_T, FEATURES != F, WIDE)
            v_base = at(value, i0, i1, i2, column)
            v = load_tile(value, v_base, S - column, FEATURES, N, F, True, FEATURES != F, WIDE)
        dp = weight_gradients(
            do, v, dout, dout_base, value, value_base, row, column, T, S,
            FEATURES, CHECK_T, M, N, F, True, False, PRECISION, WIDE,
        )  # fmt: skip
        if factors is not None:
            dp = dp * load_rows(factors, at(factors, i0, i1, i2, row), left, M, CHECK_T, WIDE)[:, None]
        if seed is not None:
            n = (i0 * lead[0] + i1) * lead[1] + i2
            dp = tl.where(kept(tl.load(seed), n, row + tl.arange(0, M), column, threshold, N), dp * keep_scale, 0.0)
        below = load_rows(inverse, at(inverse, i0, i1, i2, row), left, M, CHECK_T, WIDE)
        g0 = load_rows(shift, at(shift, i0, i1, i2, row), left, M, CHECK_T, WIDE)
        total += r * below[:, None] * (dp - g0[:, None])
    total = total if SOFTMAX else 2.0 * total
    store_tile(dbias, at(dbias, k0, k1, k2, row) + column, total, left, S - column, WIDE)
