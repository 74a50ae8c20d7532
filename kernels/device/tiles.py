"""What the Triton kernels share: how a tensor reaches a kernel, tiles of it, scaled sums, dropout, walks over tiles.

Kernels see every tensor as an `Operand` of `glomo.kernels.launch`: three leading dimensions and any strides. In the
names below M counts the targets and N the sources of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST = tl.constexpr(2.0**-100)
"""The unit that scaled sums start from. Its inverse times fp16's range is still an fp32 number."""


@triton.jit
def batch_index(n, lead):
    """(i0, i1, i2) of the flat index n; lead = (d1, d2, ...)."""
    return n // (lead[0] * lead[1]), n // lead[1] % lead[0], n % lead[1]


@triton.jit
def at(x, i0, i1, i2, row):
    """Where row `row` of a batch begins, in 64 bits: a storage may hold more than 2^31 elements."""
    return (
        x.pointer + i0.to(tl.int64) * x.d0 + i1.to(tl.int64) * x.d1 + i2.to(tl.int64) * x.d2 + row.to(tl.int64) * x.row
    )


@triton.jit
def offsets(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Offsets [ROWS, COLUMNS] within a tile; WIDE where they need 64 bits."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if WIDE:
        rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    return rows[:, None] * x.row + columns[None, :] * x.column


@triton.jit
def load_tile(
    x,
    base,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tile [ROWS, COLUMNS] that begins at base; 0 beyond num_rows and num_columns, where these are to be checked."""
    pointers = base + offsets(x, ROWS, COLUMNS, WIDE)
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if CHECK_ROWS and CHECK_COLUMNS:
        return tl.load(pointers, (rows < num_rows) & (columns < num_columns), other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers, tl.broadcast_to(rows < num_rows, ROWS, COLUMNS), other=0.0)
    elif CHECK_COLUMNS:
        return tl.load(pointers, tl.broadcast_to(columns < num_columns, ROWS, COLUMNS), other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(x, base, values, num_rows, num_columns, WIDE: tl.constexpr):
    rows, columns = tl.arange(0, values.shape[0])[:, None], tl.arange(0, values.shape[1])[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    tl.store(base + offsets(x, values.shape[0], values.shape[1], WIDE), values.to(x.pointer.dtype.element_ty), inside)


@triton.jit
def load_rows(x, base, num_rows, ROWS: tl.constexpr, CHECK: tl.constexpr, WIDE: tl.constexpr):
    """One number a row, [ROWS] in fp32; 0 beyond num_rows, where that is to be checked."""
    rows = tl.arange(0, ROWS)
    if WIDE:
        rows = rows.to(tl.int64)
    if CHECK:
        return tl.load(base + rows * x.row, rows < num_rows, other=0.0).to(tl.float32)
    else:
        return tl.load(base + rows * x.row).to(tl.float32)


@triton.jit
def mark_tile(flags, i0, i1, i2, tile, j, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sets the ROWS x COLUMNS flags of the tile (tile, j)."""
    base = at(flags, i0, i1, i2, tile * ROWS) + j * COLUMNS
    tl.store(base + offsets(flags, ROWS, COLUMNS, False), tl.full([ROWS, COLUMNS], value, tl.int8))


@triton.jit
def store_rows(x, base, values, num_rows):
    rows = tl.arange(0, values.shape[0])
    tl.store(base + rows * x.row, values, rows < num_rows)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. Tensor cores take 16-bit operands as they are; fp32 follows PyTorch's matmul precision."""
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def power_of_two(x):
    """The power of two at or below x >= 0, between SMALLEST and 2^126 (also for 0, infinity and NaN)."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(exponent, 27 << 23), 253 << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power_of_two(x):
    return ((254 << 23) - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def add_product(acc, unit, weights, values, SCALED: tl.constexpr, PRECISION: tl.constexpr):
    """acc += weights values, [M, N] times [N, D], where acc is in units of `unit`, a power of two per row [M].

    A square or a gradient may lie outside fp16, and its product with a value outside fp32: where SCALED, each row of
    the weights is divided by a power of two near its largest value so far, exactly. bf16 has fp32's range and needs
    none.
    """
    if SCALED:
        larger = tl.maximum(unit, power_of_two(tl.max(tl.abs(weights), 1)))
        inverse = inverse_power_of_two(larger)
        acc *= (unit * inverse)[:, None]
        if values.dtype == tl.float16:  # use fp16's upper range too: small weights keep their digits
            weights = weights * (inverse * 4096.0)[:, None]
        else:
            weights = weights * inverse[:, None]
        unit = larger
    return product(weights.to(values.dtype), values, acc, PRECISION), unit


@triton.jit
def in_units(factor, unit, dtype: tl.constexpr, SCALED: tl.constexpr):
    """The row factor [M] that turns add_product's sum into factor times the sum."""
    if SCALED:
        factor = factor * unit
        if dtype == tl.float16:
            factor = factor * (1.0 / 4096.0)
    return factor


@triton.jit
def inverse_denominator(normalizer, eps):
    """1 / (Z + eps), and 0 for a dead row; a subnormal Z does not make it infinite."""
    inverse = tl.div_rn(1.0, tl.where(normalizer == 0.0, 1.0, normalizer + eps))
    return tl.where(normalizer == 0.0, 0.0, tl.where(inverse > 3.4e38, 3.4e38, inverse))


@triton.jit
def kept(seed, n, rows, first_column, threshold, N: tl.constexpr):
    """Which weights [M, N] survive dropout: Philox4x32-10 with counter (j // 4, t, n mod 2^32, n // 2^32), word j mod
    4.

    rows [M] are the targets t, first_column (a multiple of 4) is the first j, n the batch-head.
    """
    groups = (first_column // 4 + tl.arange(0, N // 4))[None, :].to(tl.uint32)
    n = n.to(tl.int64)
    low, high = (n & 0xFFFFFFFF).to(tl.uint32), (n >> 32).to(tl.uint32)
    t = rows[:, None].to(tl.uint32)
    zeros = groups * 0 + t * 0
    w0, w1, w2, w3 = tl.philox(seed, groups + zeros, t + zeros, low + zeros, high + zeros)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, N / 4, 2, 2], in the order w0 w1 w2 w3
    return tl.reshape(words, rows.shape[0], N) >= tl.cast(threshold, tl.uint32)


@triton.jit
def find_sequence(cu_seqlens, num_sequences, tile, M: tl.constexpr):
    """(sequence, tile within it) of a packed batch.

    Sequence b owns the tiles from cu[b] // M + b on: at least as many as it needs, so that nothing depends on a longest
    length. A tile beyond its sequence's end has nothing to do.
    """
    sequence = -1
    for start in range(0, num_sequences, 256):
        index = start + tl.arange(0, 256)
        begin = tl.load(cu_seqlens + index, index < num_sequences, other=0)
        owned = (index < num_sequences) & (begin // M + index <= tile)
        sequence += tl.sum(owned.to(tl.int32), 0)
    sequence = tl.maximum(sequence, 0)
    return sequence, tile - (tl.load(cu_seqlens + sequence) // M + sequence).to(tl.int32)


@triton.jit
def sequence_bounds(cu_seqlens, sequence, total):
    """(first row, length), moved inside 0 .. total: a wrong boundary never reaches memory that is not the tensor's."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int32), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1).to(tl.int32), begin), total)
    return begin, end - begin


@triton.jit
def walk_sources(
    lists, base, row, T, S, diagonal, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """(begin, end) of the whole tiles, then of the partial ones, that the targets row .. row + M - 1 read. Without
    lists every tile looks at a mask."""
    if lists is not None:
        whole, visited = tl.load(base), tl.load(base + 1)
    else:
        whole, visited = S // N, tl.cdiv(S, N)
        if CAUSAL:
            whole = tl.minimum(whole, tl.maximum(row + diagonal + 1, 0) // N)
            visited = tl.minimum(visited, tl.cdiv(tl.maximum(tl.minimum(row + M, T) + diagonal, 0), N))
            visited = tl.maximum(visited, whole)
        if MASK != "none":
            whole = whole * 0
    return 0, whole, whole, visited


@triton.jit
def walk_targets(
    lists, base, column, T, diagonal, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """The same for the tiles of targets that read the sources column .. column + N - 1."""
    if lists is not None:
        whole, visited = tl.load(base), tl.load(base + 1)
        return 0, whole, whole, visited
    else:
        end = tl.cdiv(T, M)
        first, whole = end * 0, end * 0
        if CAUSAL:
            first = tl.minimum(tl.maximum(column - diagonal, 0) // M, end)
            whole = tl.minimum(tl.cdiv(tl.maximum(column + N - 1 - diagonal, 0), M), end)
        if MASK != "none":
            whole = end
        return whole, end, first, whole


@triton.jit
def tile_number(lists, base, i):
    """Which tile is the walk's i-th."""
    if lists is not None:
        return tl.load(base + 2 + i)
    else:
        return i
