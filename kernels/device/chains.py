"""Running products of graphs times features, X_l = A_l X_{l-1} within a head, beside the kernels that do these
products: a layer's share in the mixtures, and the gradient that it gets from them. Both are bound by memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import at, inverse_power_of_two, load_rows, load_tile, power_of_two, store_rows, store_tile


@triton.jit
def add_layer_kernel(
    states,  # X of every head of the layer
    weights,
    weights_step,
    out,  # fp32; out_m += sum_h c_mh X_h
    out_step,
    num_heads,
    batches,
    T,
    tiles,
    FEATURES: tl.constexpr,
    MIXTURES: tl.constexpr,
    M: tl.constexpr,
    F: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: M targets of a batch, F columns of the features."""
    row = tl.program_id(0) % tiles * M
    b = tl.program_id(0) // tiles % batches
    first = tl.program_id(0) // tiles // batches * F
    none, left = b * 0, FEATURES - first
    total = ()
    for m in tl.static_range(MIXTURES):
        base = at(out, b, none, none, row) + tl.full([], m, tl.int64) * out_step + first
        total = total + (load_tile(out, base, T - row, left, M, F, True, True, WIDE),)
    for i in range(num_heads):
        h = none + i
        base = at(states, b, none, h, row) + first.to(tl.int64) * states.column
        x = load_tile(states, base, T - row, left, M, F, True, True, WIDE).to(tl.float32)
        added = ()
        for m in tl.static_range(MIXTURES):
            base = at(weights, b, none, h, row) + tl.full([], m, tl.int64) * weights_step
            added = added + (total[m] + x * load_rows(weights, base, T - row, M, True, WIDE)[:, None],)
        total = added
    for m in tl.static_range(MIXTURES):
        base = at(out, b, none, none, row) + tl.full([], m, tl.int64) * out_step + first
        store_tile(out, base, total[m], T - row, left, WIDE)


@triton.jit
def cotangent_of_states(
    dout,
    dout_step,
    weights,
    weights_step,
    above,
    b,
    h,
    row,
    first,
    T,
    FEATURES: tl.constexpr,
    MIXTURES: tl.constexpr,
    M: tl.constexpr,
    F: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(dX [M, F] in fp32, the tiles of dout of each mixture)."""
    none, left, wide = b * 0, FEATURES - first, tl.cast(first, tl.int64)
    total = tl.zeros([M, F], tl.float32)
    if above is not None:
        base = at(above, b, none, h, row) + wide * above.column
        total += load_tile(above, base, T - row, left, M, F, True, True, WIDE).to(tl.float32)
    tiles = ()
    for m in tl.static_range(MIXTURES):
        step = tl.full([], m, tl.int64)
        base = at(dout, b, none, none, row) + step * dout_step + wide * dout.column
        d = load_tile(dout, base, T - row, left, M, F, True, True, WIDE).to(tl.float32)
        base = at(weights, b, none, h, row) + step * weights_step
        total += d * load_rows(weights, base, T - row, M, True, WIDE)[:, None]
        tiles = tiles + (d,)
    return total, tiles


@triton.jit
def layer_gradient_kernel(
    states,
    dout,
    dout_step,
    weights,
    weights_step,
    above,  # what the layer above adds to dX, A_{l+1}^T dX_{l+1}, or None
    dstates,  # result: dX_h / unit = (sum_m c_mh dout_m + above) / unit
    units,  # result: a power of two per row that keeps dX within fp16's range, or None: no unit
    dweights,  # result: dc_mh = <dout_m, X_h> per target in fp32, or None
    dweights_step,
    num_heads,
    T,
    tiles,
    FEATURES: tl.constexpr,
    MIXTURES: tl.constexpr,
    M: tl.constexpr,
    F: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: M targets of a batch and head."""
    row = tl.program_id(0) % tiles * M
    h = tl.program_id(0) // tiles % num_heads
    b = tl.program_id(0) // tiles // num_heads
    none = b * 0
    largest = tl.zeros([M], tl.float32)
    dots = (tl.zeros([M], tl.float32),) * MIXTURES
    for first in range(0, FEATURES, F):
        total, d = cotangent_of_states(
            dout, dout_step, weights, weights_step, above, b, h, row, first, T, FEATURES, MIXTURES, M, F, WIDE
        )
        wide = tl.cast(first, tl.int64)
        if units is None:
            base = at(dstates, b, none, h, row) + wide * dstates.column
            store_tile(dstates, base, total, T - row, FEATURES - first, WIDE)
        largest = tl.maximum(largest, tl.max(tl.abs(total), 1))
        if dweights is not None:
            base = at(states, b, none, h, row) + wide * states.column
            x = load_tile(states, base, T - row, FEATURES - first, M, F, True, True, WIDE).to(tl.float32)
            added = ()
            for m in tl.static_range(MIXTURES):
                added = added + (dots[m] + tl.sum(d[m] * x, 1),)
            dots = added
    if units is not None:
        unit = power_of_two(largest) * (1.0 / 4096.0)  # fp16's upper range too: small numbers keep their digits
        store_rows(units, at(units, b, none, h, row), unit, T - row)
        for first in range(0, FEATURES, F):
            total, _ = cotangent_of_states(
                dout, dout_step, weights, weights_step, above, b, h, row, first, T, FEATURES, MIXTURES, M, F, WIDE
            )
            base = at(dstates, b, none, h, row) + tl.cast(first, tl.int64) * dstates.column
            total = total * inverse_power_of_two(unit)[:, None]
            store_tile(dstates, base, total, T - row, FEATURES - first, WIDE)
    if dweights is not None:
        for m in tl.static_range(MIXTURES):
            base = at(dweights, b, none, h, row) + tl.full([], m, tl.int64) * dweights_step
            store_rows(dweights, base, dots[m], T - row)
