"""Scores in Triton, tile by tile, in both orientations: scale <q, k> + bias on allowed pairs, and what the two ops make
of them: r = relu(s) for ReLU², exp(s - peak) for softmax. The score's gradient is that slope times a number a row.

A bias comes as one of the kinds "none", "scalar" (one number a batch-head), "row" (a number a target), "column" (a
number a source), "full"; a mask as "none", "column", "full". What a kind needs once is loaded outside the walk over the
tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_rows, load_tile, product

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores(
    query,  # [M, E]
    key,  # [N, E]
    bias,
    bias_base,  # at the tile's first target
    bias_rows,  # [M] for the kinds "scalar" and "row"
    mask,
    mask_base,
    row,  # the tile's first target and source
    column,
    num_rows,  # T and S
    num_columns,
    diagonal,
    scale,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PARTIAL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """[M, N] or the transpose [N, M]: for SOFTMAX s, -inf where a pair is not allowed, else relu(s), 0 there.

    Only PARTIAL tiles look at the mask, the diagonal and the last source.
    """
    M: tl.constexpr = query.shape[0]
    N: tl.constexpr = key.shape[0]
    if TRANSPOSED:
        s = product(key, tl.trans(query), None, PRECISION)
    else:
        s = product(query, tl.trans(key), None, PRECISION)
    if SCALE:
        s = s * scale
    if BIAS == "scalar" or BIAS == "row":
        s = s + (bias_rows[None, :] if TRANSPOSED else bias_rows[:, None])
    elif BIAS == "column":
        columns = tl.arange(0, N)
        b = tl.load(
            bias_base + (column + columns).to(tl.int64) * bias.column, columns < num_columns - column, other=0.0
        ).to(tl.float32)
        s = s + (b[:, None] if TRANSPOSED else b[None, :])
    elif BIAS == "full":
        base = bias_base + column.to(tl.int64) * bias.column
        b = load_tile(bias, base, num_rows - row, num_columns - column, M, N, True, True, WIDE).to(tl.float32)
        b = tl.trans(b) if TRANSPOSED else b
        if PRECISION == "ieee" and query.dtype == tl.float32:
            s = tl.fma(s, 1.0, b)  # a plain sum would be the product's start, and its operands wait for it in registers
        else:
            s = s + b
    if not SOFTMAX:
        s = tl.maximum(s, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if PARTIAL:
        j, t = column + tl.arange(0, N), row + tl.arange(0, M)
        j, t = (j[:, None], t[None, :]) if TRANSPOSED else (j[None, :], t[:, None])
        allowed = (j < num_columns) & (t < num_rows)
        if CAUSAL:
            allowed = allowed & (j <= t + diagonal)
        if MASK == "column":
            columns = tl.arange(0, N)
            m = (
                tl.load(
                    mask_base + (column + columns).to(tl.int64) * mask.column, columns < num_columns - column, other=0
                )
                != 0
            )
            allowed = allowed & (m[:, None] if TRANSPOSED else m[None, :])
        elif MASK == "full":
            base = mask_base + column.to(tl.int64) * mask.column
            m = load_tile(mask, base, num_rows - row, num_columns - column, M, N, True, True, WIDE) != 0
            allowed = allowed & (tl.trans(m) if TRANSPOSED else m)
        s = tl.where(allowed, s, float("-inf") if SOFTMAX else 0.0)
    return s


@triton.jit
def exponentials(s, peak, scale, FOLDED: tl.constexpr):
    """exp of the scores over their row's peak, which is broadcast to them.

    FOLDED scores are not scaled yet, and their peak is in powers of two: one instruction before the exponential.
    """
    if FOLDED:
        return tl.exp2(s * (scale * LOG2_E) - peak)
    else:  # a difference first: a mask's largest negative number times log2(e) is no number
        return tl.exp2((s - peak) * LOG2_E)


@triton.jit
def slopes(
    query,
    key,
    bias,
    bias_base,
    bias_rows,
    mask,
    mask_base,
    peaks,  # [M], for SOFTMAX
    row,
    column,
    num_rows,
    num_columns,
    diagonal,
    scale,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    FOLDED: tl.constexpr,
    PARTIAL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """r or exp(s - peak) [M, N], or the transpose."""
    s = scores(
        query, key, bias, bias_base, bias_rows, mask, mask_base, row, column, num_rows, num_columns, diagonal, scale,
        BIAS, MASK, CAUSAL, SCALE, SOFTMAX, PARTIAL, TRANSPOSED, PRECISION, WIDE,
    )  # fmt: skip
    if SOFTMAX:
        s = exponentials(s, peaks[None, :] if TRANSPOSED else peaks[:, None], scale, FOLDED)
    return s


@triton.jit
def bias_of_rows(bias, base, num_rows, BIAS: tl.constexpr, M: tl.constexpr, CHECK: tl.constexpr, WIDE: tl.constexpr):
    """[M] for the kinds "scalar" and "row", and a placeholder for the others."""
    if BIAS == "row":
        return load_rows(bias, base, num_rows, M, CHECK, WIDE)
    elif BIAS == "scalar":
        return tl.load(base).to(tl.float32) + tl.zeros([M], tl.float32)
    else:
        return tl.zeros([M], tl.float32)


@triton.jit
def load_peaks(x, base, num_rows, ROWS: tl.constexpr, CHECK: tl.constexpr, WIDE: tl.constexpr):
    """[ROWS]; infinite beyond num_rows, so that no exponential there overflows."""
    peaks = load_rows(x, base, num_rows, ROWS, CHECK, WIDE)
    if CHECK:
        peaks = tl.where(tl.arange(0, ROWS) < num_rows, peaks, float("inf"))
    return peaks
