"""Mixtures of graphs in Triton, for graphs that lie in memory and for graphs of relu2_affinity, computed tile by tile.

Two ways to out_m = sum_n w_mn A_n F. `mixed_kernel` sums the weighted tiles of the graphs before one product with the
features, and needs every 1 / (Z + eps) first; `graph_by_graph_kernel` needs nothing, and a product for every graph.
The gradients, with dP_m = dout_m F^T: dF = sum_m (sum_n w_mn A_n)^T dout_m (`features_kernel`), and per target
dw_mn = <A_n, dP_m> (`moments_kernel`). The kernels of `gradients` do the rest, with w_mn dw_mn for delta.

A program's loop over the graphs lies inside of that over the tiles. Operands have the batch in their first leading
dimension and the graphs in the third; the MIXTURES of one launch lie `step` elements apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import attend
from .scores import bias_of_rows, scores
from .tiles import (
    SMALLEST,
    add_product,
    at,
    in_units,
    inverse_denominator,
    load_rows,
    load_tile,
    product,
    store_rows,
    store_tile,
    tile_number,
    walk_sources,
    walk_targets,
)


@triton.jit
def graph_tile(
    graphs,  # given, or None
    query,
    key,
    bias,
    bias_rows,  # [M], of its kinds "scalar" and "row"
    mask,
    b,
    n,
    row,
    column,
    T,
    S,
    diagonal,
    scale,
    WIDTH: tl.constexpr,
    CHECK_T: tl.constexpr,
    CHECK_S: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    PARTIAL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Graph n's tile [M, N], or its transpose, in fp32: given, or r², which is A but for the factor 1 / (Z + eps)."""
    none = b * 0
    if graphs is not None:
        base = at(graphs, b, none, n, row) + column.to(tl.int64) * graphs.column
        a = load_tile(graphs, base, T - row, S - column, M, N, CHECK_T, CHECK_S, WIDE).to(tl.float32)
        return tl.trans(a) if TRANSPOSED else a
    else:
        q = load_tile(query, at(query, b, none, n, row), T - row, WIDTH, M, E, CHECK_T, E != WIDTH, WIDE)
        k = load_tile(key, at(key, b, none, n, column), S - column, WIDTH, N, E, CHECK_S, E != WIDTH, WIDE)
        bias_base = at(bias, b, none, n, row) if bias is not None else None
        mask_base = at(mask, b, none, n, row) if mask is not None else None
        r = scores(
            q, k, bias, bias_base, bias_rows, mask, mask_base, row, column, T, S, diagonal, scale,
            BIAS, MASK, CAUSAL, SCALE, False, PARTIAL, TRANSPOSED, PRECISION, WIDE,
        )  # fmt: skip
        return r * r


@triton.jit
def rows_of(
    bias, weights, weights_step, b, n, row, T, BIAS: tl.constexpr, MIXTURES: tl.constexpr, M: tl.constexpr,
    CHECK_T: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(the bias of graph n's rows, its weight in each mixture), [M] each."""
    none = b * 0
    bias_base = at(bias, b, none, n, row) if bias is not None else None
    found = (bias_of_rows(bias, bias_base, T - row, BIAS, M, CHECK_T, WIDE),)
    for m in tl.static_range(MIXTURES):
        base = at(weights, b, none, n, row) + tl.full([], m, tl.int64) * weights_step
        found = found + (load_rows(weights, base, T - row, M, CHECK_T, WIDE),)
    return found


@triton.jit
def mixed_tile(
    graphs, query, key, bias, mask, weights, weights_step, num_graphs, b, row, column, T, S, diagonal, scale,
    WIDTH: tl.constexpr, CHECK_T: tl.constexpr, CHECK_S: tl.constexpr, MIXTURES: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, E: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SCALE: tl.constexpr, PARTIAL: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For each mixture sum_n w_n A_n of a tile, or the transpose, in fp32."""
    mixed = (tl.zeros([N, M] if TRANSPOSED else [M, N], tl.float32),) * MIXTURES
    rows = rows_of(bias, weights, weights_step, b, b * 0, row, T, BIAS, MIXTURES, M, CHECK_T, WIDE)
    for i in range(num_graphs):
        n = b * 0 + i
        # the next graph's numbers: the compiler copies tiles ahead of their use, but not these
        after = tl.minimum(n + 1, num_graphs - 1)
        following = rows_of(bias, weights, weights_step, b, after, row, T, BIAS, MIXTURES, M, CHECK_T, WIDE)
        a = graph_tile(
            graphs, query, key, bias, rows[0], mask, b, n, row, column, T, S, diagonal, scale,
            WIDTH, CHECK_T, CHECK_S, M, N, E, BIAS, MASK, CAUSAL, SCALE, PARTIAL, TRANSPOSED, PRECISION, WIDE,
        )  # fmt: skip
        added = ()
        for m in tl.static_range(MIXTURES):
            w = rows[m + 1]
            added = added + (mixed[m] + a * (w[None, :] if TRANSPOSED else w[:, None]),)
        mixed, rows = added, following
    return mixed


@triton.jit
def store_sum(values, addend, out, b, row, offset, num_rows, num_columns, WIDE: tl.constexpr):
    """Stores values, plus the same place of the addend, where there is one."""
    if addend is not None:
        base = at(addend, b, b * 0, b * 0, row) + offset
        values += load_tile(addend, base, num_rows, num_columns, values.shape[0], values.shape[1], True, True, WIDE)
    store_tile(out, at(out, b, b * 0, b * 0, row) + offset, values, num_rows, num_columns, WIDE)


@triton.jit
def mixed_kernel(
    features,
    graphs,
    query,
    key,
    bias,
    mask,
    weights,  # times 1 / (Z + eps), where the graphs are computed
    weights_step,
    addend,  # fp32, or None
    out,  # result
    out_step,  # also of the addend
    lists,
    num_graphs,
    batches,
    T,
    S,
    tiles,
    diagonal,
    scale,
    WIDTH: tl.constexpr,
    CHECK_T: tl.constexpr,
    FEATURES: tl.constexpr,
    MIXTURES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: M targets of a batch, F + G columns of the features, every graph."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles % batches
    first = tl.program_id(0) // tiles // batches * (F + G)
    none, row = b * 0, tile * M
    CHECK_F: tl.constexpr = FEATURES % (F + G) != 0 or FEATURES == 0
    lists_base = at(lists, b, none, none, tile) if lists is not None else None
    walk = walk_sources(lists, lists_base, row, T, S, diagonal, M, N, CAUSAL, MASK)

    acc = (tl.zeros([M, F], tl.float32),) * MIXTURES
    rest = (tl.zeros([M, G if G else 1], tl.float32),) * MIXTURES
    unit = (tl.full([M], SMALLEST, tl.float32),) * MIXTURES
    for PARTIAL in tl.static_range(2):
        for i in range(walk[2 * PARTIAL], walk[2 * PARTIAL + 1]):
            column = tile_number(lists, lists_base, i) * N
            mixed = mixed_tile(
                graphs, query, key, bias, mask, weights, weights_step, num_graphs, b, row, column,
                T, S, diagonal, scale, WIDTH, CHECK_T, PARTIAL, MIXTURES, M, N, E, BIAS, MASK, CAUSAL, SCALE,
                PARTIAL, False, PRECISION, WIDE,
            )  # fmt: skip
            base = at(features, b, none, none, column) + first.to(tl.int64) * features.column
            f = load_tile(features, base, S - column, FEATURES - first, N, F, PARTIAL, CHECK_F, WIDE)
            g = f
            if G:
                base += tl.full([], F, tl.int64) * features.column
                g = load_tile(features, base, S - column, FEATURES - first - F, N, G, PARTIAL, CHECK_F, WIDE)
            sums, more, units = (), (), ()
            for m in tl.static_range(MIXTURES):
                total, larger = add_product(acc[m], unit[m], mixed[m], f, SCALED, PRECISION)
                others = rest[m]
                if G:
                    others, _ = add_product(rest[m], unit[m], mixed[m], g, SCALED, PRECISION)
                sums, more, units = sums + (total,), more + (others,), units + (larger,)
            acc, rest, unit = sums, more, units

    for m in tl.static_range(MIXTURES):
        factor = in_units(tl.full([M], 1.0, tl.float32), unit[m], features.pointer.dtype.element_ty, SCALED)[:, None]
        step = tl.full([], m, tl.int64) * out_step + first
        store_sum(acc[m] * factor, addend, out, b, row, step, T - row, FEATURES - first, WIDE)
        if G:
            store_sum(rest[m] * factor, addend, out, b, row, step + F, T - row, FEATURES - first - F, WIDE)


@triton.jit
def graph_by_graph_kernel(
    query,
    key,
    features,
    bias,
    mask,
    inverse,  # results: 1 / (Z + eps) of every graph ...
    weights,
    weights_step,
    out,  # ... and the mixtures
    out_step,
    lists,
    num_graphs,
    batches,
    T,
    S,
    tiles,
    diagonal,
    scale,
    eps,
    WIDTH: tl.constexpr,
    CHECK_T: tl.constexpr,
    FEATURES: tl.constexpr,
    MIXTURES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The same, in one pass: each graph times the features, then its share of the mixtures."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles % batches
    first = tl.program_id(0) // tiles // batches * F
    none, row = b * 0, tile * M
    total = (tl.zeros([M, F], tl.float32),) * MIXTURES
    for i in range(num_graphs):
        n = none + i
        acc, _, unit, z, _, _ = attend(
            query, key, features, bias, mask, None, lists, None, b, none, n, none, none, none, tile, first,
            T, S, diagonal, scale, 0, WIDTH, CHECK_T, FEATURES, M, N, E, F, 0, BIAS, MASK, CAUSAL, SCALE,
            False, False, SCALED, 1, 1, PRECISION, WIDE,
        )  # fmt: skip
        below = inverse_denominator(z, eps)
        acc = acc * in_units(below, unit, features.pointer.dtype.element_ty, SCALED)[:, None]
        added = ()
        for m in tl.static_range(MIXTURES):
            base = at(weights, b, none, n, row) + tl.full([], m, tl.int64) * weights_step
            w = load_rows(weights, base, T - row, M, CHECK_T, WIDE)
            added = added + (total[m] + acc * w[:, None],)
        total = added
        if first == 0:
            store_rows(inverse, at(inverse, b, none, n, row), below, T - row)
    for m in tl.static_range(MIXTURES):
        base = at(out, b, none, none, row) + tl.full([], m, tl.int64) * out_step + first
        store_tile(out, base, total[m], T - row, FEATURES - first, WIDE)


@triton.jit
def features_kernel(
    dout,
    dout_step,
    graphs,
    query,
    key,
    bias,
    mask,
    weights,  # times 1 / (Z + eps), where the graphs are computed
    weights_step,
    dfeatures,  # result
    lists,
    num_graphs,
    batches,
    T,
    S,
    tiles,
    diagonal,
    scale,
    WIDTH: tl.constexpr,
    CHECK_T: tl.constexpr,
    FEATURES: tl.constexpr,
    MIXTURES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: N sources of a batch, F + G columns of the features, every graph."""
    tile = tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles % batches
    first = tl.program_id(0) // tiles // batches * (F + G)
    none, column = b * 0, tile * N
    CHECK_F: tl.constexpr = FEATURES % (F + G) != 0 or FEATURES == 0
    lists_base = at(lists, b, none, none, tile) if lists is not None else None
    walk = walk_targets(lists, lists_base, column, T, diagonal, M, N, CAUSAL, MASK)

    acc = tl.zeros([N, F], tl.float32)
    rest = tl.zeros([N, G if G else 1], tl.float32)
    unit = tl.full([N], SMALLEST, tl.float32)
    for PARTIAL in tl.static_range(2):
        for i in range(walk[2 * PARTIAL], walk[2 * PARTIAL + 1]):
            row = tile_number(lists, lists_base, i) * M
            mixed = mixed_tile(
                graphs, query, key, bias, mask, weights, weights_step, num_graphs, b, row, column,
                T, S, diagonal, scale, WIDTH, CHECK_T, True, MIXTURES, M, N, E, BIAS, MASK, CAUSAL, SCALE,
                PARTIAL, True, PRECISION, WIDE,
            )  # fmt: skip
            for m in tl.static_range(MIXTURES):
                base = at(dout, b, none, none, row) + tl.full([], m, tl.int64) * dout_step
                base += first.to(tl.int64) * dout.column
                d = load_tile(dout, base, T - row, FEATURES - first, M, F, CHECK_T, CHECK_F, WIDE)
                acc, larger = add_product(acc, unit, mixed[m], d, SCALED, PRECISION)
                if G:
                    base += tl.full([], F, tl.int64) * dout.column
                    d = load_tile(dout, base, T - row, FEATURES - first - F, M, G, CHECK_T, CHECK_F, WIDE)
                    rest, _ = add_product(rest, unit, mixed[m], d, SCALED, PRECISION)
                unit = larger

    factor = in_units(tl.full([N], 1.0, tl.float32), unit, dout.pointer.dtype.element_ty, SCALED)[:, None]
    base = at(dfeatures, b, none, none, column) + first
    store_tile(dfeatures, base, acc * factor, S - column, FEATURES - first, WIDE)
    if G:
        store_tile(dfeatures, base + F, rest * factor, S - column, FEATURES - first - F, WIDE)


@triton.jit
def moments_kernel(
    dout,
    dout_step,
    features,
    graphs,
    query,
    key,
    bias,
    mask,
    weights,
    weights_step,
    moments,  # result, zeros before: <A_n, dP_m> per target (but for 1 / (Z + eps)), or None
    moments_step,
    dgraphs,  # added to: sum_m w_mn dP_m, or None
    lists,
    num_graphs,
    T,
    S,
    tiles,
    diagonal,
    scale,
    WIDTH: tl.constexpr,
    CHECK_T: tl.constexpr,
    FEATURES: tl.constexpr,
    MIXTURES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: M targets of a batch, every graph."""
    WEIGHTS: tl.constexpr = 0 if dgraphs is None else MIXTURES
    tile = tiles - 1 - tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles
    none, row = b * 0, tile * M
    lists_base = at(lists, b, none, none, tile) if lists is not None else None
    walk = walk_sources(lists, lists_base, row, T, S, diagonal, M, N, CAUSAL, MASK)

    for PARTIAL in tl.static_range(2):
        for i in range(walk[2 * PARTIAL], walk[2 * PARTIAL + 1]):
            column = tile_number(lists, lists_base, i) * N
            dp = (tl.zeros([M, N], tl.float32),) * MIXTURES
            for first in range(0, FEATURES, F):
                left, wide = FEATURES - first, tl.cast(first, tl.int64)
                base = at(features, b, none, none, column) + wide * features.column
                f = load_tile(features, base, S - column, left, N, F, PARTIAL, True, WIDE)
                added = ()
                for m in tl.static_range(MIXTURES):
                    base = at(dout, b, none, none, row) + tl.full([], m, tl.int64) * dout_step + wide * dout.column
                    d = load_tile(dout, base, T - row, left, M, F, CHECK_T, True, WIDE)
                    added = added + (product(d, tl.trans(f), dp[m], PRECISION),)
                dp = added
            rows = rows_of(bias, weights, weights_step, b, none, row, T, BIAS, WEIGHTS, M, CHECK_T, WIDE)
            for g in range(num_graphs):
                n = none + g
                after = tl.minimum(n + 1, num_graphs - 1)
                following = rows_of(bias, weights, weights_step, b, after, row, T, BIAS, WEIGHTS, M, CHECK_T, WIDE)
                if moments is not None:
                    a = graph_tile(
                        graphs, query, key, bias, rows[0], mask, b, n, row, column, T, S, diagonal, scale, WIDTH,
                        CHECK_T, PARTIAL, M, N, E, BIAS, MASK, CAUSAL, SCALE, PARTIAL, False, PRECISION, WIDE,
                    )  # fmt: skip
                    for m in tl.static_range(MIXTURES):
                        base = at(moments, b, none, n, row) + tl.full([], m, tl.int64) * moments_step
                        before = load_rows(moments, base, T - row, M, True, WIDE)
                        store_rows(moments, base, before + tl.sum(a * dp[m], 1), T - row)
                if dgraphs is not None:
                    base = at(dgraphs, b, none, n, row) + column.to(tl.int64) * dgraphs.column
                    da = load_tile(dgraphs, base, T - row, S - column, M, N, True, True, WIDE).to(tl.float32)
                    for m in tl.static_range(MIXTURES):
                        da += dp[m] * rows[m + 1][:, None]
                    store_tile(dgraphs, base, da, T - row, S - column, WIDE)
                rows = following
            tl.debug_barrier()  # the next tile adds to the same moments
