"""The gradient dP of the weights of a tile, from the gradient dout of the output.

Where the output is a mixture of graphs (relu2_graph_mix), a graph's own dout is sum_m w_m[t] dout_m[t] over the
mixtures, made tile by tile in units of a number a row: w_1 of a single mixture, whose dout is taken as it is, or a
power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import inverse_power_of_two, load_rows, load_tile, power_of_two, product


@triton.jit
def row_units(
    weights, base, step, num_rows, ROWS: tl.constexpr, CHECK: tl.constexpr, MIXTURES: tl.constexpr, WIDE: tl.constexpr
):
    """[ROWS]: the unit of a graph's dout; 1 where it is no mixture."""
    if MIXTURES == 0:
        return tl.full([ROWS], 1.0, tl.float32)
    elif MIXTURES == 1:
        return load_rows(weights, base, num_rows, ROWS, CHECK, WIDE)
    else:
        largest = tl.zeros([ROWS], tl.float32)
        for m in tl.static_range(MIXTURES):
            w = load_rows(weights, base + tl.full([], m, tl.int64) * step, num_rows, ROWS, CHECK, WIDE)
            largest = tl.maximum(largest, tl.abs(w))
        return power_of_two(largest)


@triton.jit
def cotangents(
    dout,
    base,
    dout_step,  # from one mixture to the next
    weights,
    weights_base,
    weights_step,
    unit,  # [ROWS]
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
    MIXTURES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of a graph's dout / unit."""
    if MIXTURES < 2:
        return load_tile(dout, base, num_rows, num_columns, ROWS, COLUMNS, CHECK_ROWS, CHECK_COLUMNS, WIDE)
    else:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        inverse = inverse_power_of_two(unit)
        for m in tl.static_range(MIXTURES):
            step = tl.full([], m, tl.int64)
            w = load_rows(weights, weights_base + step * weights_step, num_rows, ROWS, CHECK_ROWS, WIDE) * inverse
            d = load_tile(
                dout, base + step * dout_step, num_rows, num_columns, ROWS, COLUMNS, CHECK_ROWS, CHECK_COLUMNS, WIDE
            )
            total += w[:, None] * d.to(tl.float32)
        return total.to(dout.pointer.dtype.element_ty)


@triton.jit
def weight_gradients(
    do,  # [M, F] and [N, F], the tiles of dout and value where these are no wider than F
    v,
    dout,
    dout_base,  # at the tile's first target
    dout_step,
    value,  # None: dout is the gradient of the affinity itself
    value_base,
    weights,
    weights_base,
    weights_step,
    unit,
    row,
    column,
    T,
    S,
    FEATURES: tl.constexpr,
    CHECK_T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    F: tl.constexpr,
    MIXTURES: tl.constexpr,
    CHECK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dP / unit [M, N] or its transpose [N, M] in fp32, before dropout."""
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
            a = cotangents(
                dout, dout_base + wide * dout.column, dout_step, weights, weights_base, weights_step, unit,
                T - row, left, M, F, CHECK_T, True, MIXTURES, WIDE,
            )  # fmt: skip
            if TRANSPOSED:
                dp = product(b, tl.trans(a), dp, PRECISION)
            else:
                dp = product(a, tl.trans(b), dp, PRECISION)
        return dp
