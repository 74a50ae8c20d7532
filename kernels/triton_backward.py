"""The host's side of the gradient kernels (`glomo.kernels.device.gradients`), for relu2_attention, relu2_affinity and
attention, and for queries, keys and biases of mixtures of graphs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .arguments import at_least_2d
from .configurations import Configuration, block, configuration, precision, weight
from .launch import (
    Launch,
    Lead,
    Operand,
    TooManyDimensions,
    at_addresses,
    diagonal_within,
    dropout_numbers,
    expand_all,
    is_folded,
    is_wide,
    kind_of,
    layout,
    remembered,
    tile_count,
)
from .triton_attention import Numbers, packed_pairs
from .triton_lists import mask_states, tile_lists, transposed

_TOLERANCE = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-24}
"""A rounding: rows whose gradients a more exact delta changes by more are walked again."""


def score_gradients(
    dout: Tensor,
    out: Tensor | None,
    statistics: dict[str, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    numbers: Numbers,
    needs: list[bool],
    active: Tensor | None = None,
    sequences: tuple[Tensor | None, Tensor | None] = (None, None),
    value_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Gradients of query, key, value and bias, empty where `needs` says that none is needed.

    The statistics of the rows are the normalizer and its gradient dnormalizer; for softmax the sum of exp(s - peak),
    the gradient of lse, and the peak; or else `inverse`, 1 / (Z + eps), and an exact `delta` if there is one. The rows
    of dout may have `factors`. Without value and out, dout is the gradient of the affinity. Packed batches come as
    views (..., total, D). value_dtype is of the value's gradient, if not the value's own.
    """
    dropout_p, diagonal, scale, eps = numbers
    lead = next(iter(statistics.values())).shape[:-1]
    inputs = dict(query=query, key=key, value=value, bias=at_least_2d(bias), mask=at_least_2d(attn_mask))
    rows: dict[str, Tensor | None] = dict.fromkeys(_STATISTICS) | statistics | dict(dout=dout, out=out)
    options = dict(
        diagonal=diagonal_within(diagonal, query.size(-2), key.size(-2)),
        scale=scale,
        **dropout_numbers(dropout_p),
    )
    try:
        call = _call(lead, inputs | rows, active, sequences, seed, diagonal, eps, options)
    except TooManyDimensions:
        wide = dict(zip(inputs, expand_all(lead, list(inputs.values())), strict=True))
        rows |= {name: t if t is None else t.contiguous() for name, t in rows.items()}
        call = _call(lead, wide | rows, active, sequences, seed, diagonal, eps, options)
    need_query, need_key, need_value, need_bias = needs
    kind = kind_of(inputs["bias"], scalars=True) if need_bias else "none"
    need_rows = kind in ("scalar", "row")
    per_row, dquery, row_sums = (call.operands["delta"], call.operands["inverse"]), None, None
    if need_query or need_rows or not call.knows_rows(need_key or kind != "none"):
        per_row, dquery, row_sums = call.targets(need_query, need_rows)
    dkey, dvalue, column_sums = call.sources(per_row, need_key, need_value, kind == "column", value_dtype)
    dbias = row_sums if row_sums is not None else column_sums
    if kind == "full":
        dbias = call.pairs(per_row)
    gradients = [dquery, dkey, dvalue, dbias]
    return [
        query.new_empty(0) if g is None or t is None else g if g.shape == t.shape else g.sum_to_size(t.shape)
        for g, t in zip(gradients, (query, key, value, bias), strict=True)
    ]


def packed_gradients(
    dout: Tensor,
    out: Tensor,
    statistics: dict[str, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    numbers: Numbers,
    needs: list[bool],
) -> list[Tensor]:
    """The same for packed batches as they are: (total, ..., D), statistics (total, ...)."""
    dout, out, query, key, value = (t.movedim(0, -2) for t in (dout, out, query, key, value))
    rows = {name: t.movedim(0, -1) for name, t in statistics.items()}
    gradients = score_gradients(
        dout, out, rows, query, key, value, packed_pairs(bias), None, seed, numbers, needs,
        sequences=(cu_seqlens_q, cu_seqlens_k),
    )  # fmt: skip
    back = [((-2,), (0,))] * 3 + [((-2, -1), (0, 1))]
    return [g.movedim(*m).contiguous() if need else g for g, m, need in zip(gradients, back, needs, strict=True)]


_CALLS: dict[Any, _Call] = {}


def _call(
    lead: torch.Size,
    tensors: dict[str, Tensor | None],
    active: Tensor | None,
    sequences: tuple[Tensor | None, Tensor | None],
    seed: Tensor | None,
    diagonal: int | None,
    eps: float,
    options: dict[str, Any],
) -> _Call:
    """One backward pass, from what is remembered of an earlier one with the same layout."""
    query = tensors["query"]
    assert query is not None
    settings = (diagonal, eps, seed is not None, *options.values(), precision(query.dtype))
    known = (lead, layout(*tensors.values(), active, *sequences), settings)
    call = copy.copy(remembered(_CALLS, known, lambda: _Call(lead, tensors)))
    call.query, call.key, call.value, call.bias, call.mask = (
        tensors[n] for n in ("query", "key", "value", "bias", "mask")
    )
    call.operands = at_addresses(call.operands, tensors)
    call.active, call.states = active, None
    call.cu_seqlens_q, call.cu_seqlens_k = sequences
    call.packed = sequences[0] is not None
    call.sequences = 0 if sequences[0] is None else sequences[0].size(0) - 1
    call.diagonal, call.eps, call.seed = diagonal, eps, seed
    call.options = options
    return call


_STATISTICS = ("normalizer", "dnormalizer", "peak", "delta", "inverse", "factors")
"""Operands with one number a row."""


Rows = tuple[Operand | None, Operand | None]
"""(shift, inverse)."""


class _Call:
    """One backward pass: the operands that its kernels share."""

    query: Any  # tensors, None where the call has none
    key: Any
    value: Any
    bias: Any
    mask: Any
    active: Tensor | None
    seed: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    states: Operand | None
    packed: bool
    sequences: int
    diagonal: int | None
    eps: float
    options: dict[str, Any]
    exact: bool

    def __init__(self, lead: torch.Size, tensors: dict[str, Tensor | None]) -> None:
        tails = {name: 1 if name in _STATISTICS else 2 for name in tensors}
        self.batches = Lead(lead, [(t, tails[name]) for name, t in tensors.items() if t is not None])
        views = {name: self.batches.optional(t, tails[name]) for name, t in tensors.items()}
        self.operands = {name: None if x is None else x._replace(pointer=None) for name, x in views.items()}
        self.configurations: dict[str, tuple[Configuration, dict[str, Any]]] = {}
        query, key = tensors["query"], tensors["key"]
        assert query is not None and key is not None
        self.T, self.S = query.size(-2), key.size(-2)
        self.softmax = tensors["peak"] is not None
        self.exact = tensors["delta"] is not None

    def knows_rows(self, scores: bool) -> bool:
        """Whether the rows' statistics are given: 1 / (Z + eps), and for gradients of scores also delta."""
        return self.operands["inverse"] is not None and (self.exact or not scores)

    def _inputs(self) -> dict[str, Operand | None]:
        """Of the kernels that take what the first one made of the rows' statistics."""
        names = ("query", "key", "value", "bias", "mask", "dout", "factors", "peak")
        return {name: self.operands[name] for name in names}

    def _lists(self, tile: Configuration, over_targets: bool) -> Operand | None:
        """Tiles to visit, from the active blocks that the forward pass found or else from the mask."""
        if self.states is None:
            if self.active is not None:
                flags = self.active.view(*self.batches.sizes, *self.active.shape[-2:])
                self.states = Operand(flags, *flags.stride())
            elif self.mask is not None:
                self.states = mask_states(self.batches, self.mask, self.T, self.S, self.diagonal)
            else:
                return None
        if over_targets:
            return tile_lists(transposed(self.states), self.S, self.T, tile.N, tile.M)
        return tile_lists(self.states, self.T, self.S, tile.M, tile.N)

    def _empty(self, kept: tuple[bool, ...], *tail: int, dtype: torch.dtype) -> Tensor:
        """A result (k0, k1, k2, *tail), in memory with the rows first where the batch is packed."""
        sizes = [n if k else 1 for n, k in zip(self.batches.sizes, kept, strict=True)]
        device = self.query.device
        if self.packed:
            return torch.empty(tail[0], *sizes, *tail[1:], dtype=dtype, device=device).movedim(0, 3)
        return torch.empty(*sizes, *tail, dtype=dtype, device=device)

    def _operand(self, t: Tensor | None) -> Operand | None:
        """Of a result (k0, k1, k2, rows, columns) or (k0, k1, k2, rows)."""
        if t is None:
            return None
        s = t.stride()
        return Operand(t, s[0], s[1], s[2], s[3], s[4] if t.dim() == 5 else 0)

    def _finish(
        self, buffer: Tensor | None, t: Tensor | None, kept: tuple[bool, ...], dtype: torch.dtype | None = None
    ) -> Tensor | None:
        return None if buffer is None or t is None else self.batches.sum_to(buffer, t, kept, dtype)

    def _dtype(self, t: Tensor, kept: tuple[bool, ...]) -> torch.dtype:
        """fp32 where a sum follows."""
        return t.dtype if self.batches.owns(t) == kept else torch.float32

    def _scaled(self) -> bool:
        """Whether products with gradients of scores leave the dtype's range: for softmax fp16's alone."""
        return self.query.dtype == torch.float16 or (self.query.dtype == torch.float32 and not self.softmax)

    def _configuration(self, kernel: str) -> tuple[Configuration, dict[str, Any]]:
        return remembered(self.configurations, kernel, lambda: self._choose(kernel))

    def _choose(self, kernel: str) -> tuple[Configuration, dict[str, Any]]:
        width = block(self.query.size(-1))
        kind = kind_of(self.bias, scalars=True)
        masked = self.mask is not None or self.active is not None
        heavy = weight(self.diagonal, self.packed, kind, masked, self.seed is not None, self.query, self.value)
        if self.softmax:
            kernel = f"attention_{kernel}"
        elif self.value is None and kernel != "pairs":
            kernel = f"affinity_{kernel}"
        folded = is_folded(self.softmax, kind, self.options["scale"])
        if self.operands["factors"] is not None and self.query.dtype == torch.float32:
            heavy = 3
        tile = configuration(kernel, self.query, block(0 if self.value is None else self.value.size(-1)), heavy)
        constants = dict(
            WIDTH=self.query.size(-1),
            CHECK_T=self.packed or self.T % tile.M != 0,
            FEATURES=16 if self.value is None else self.value.size(-1),
            M=tile.M,
            N=tile.N,
            E=width,
            F=tile.features,
            BIAS=kind,
            MASK=kind_of(self.mask, scalars=False),
            CAUSAL=self.diagonal is not None,
            SCALE=self.options["scale"] != 1.0 and not folded,
            FOLDED=folded,
            PRECISION=precision(self.query.dtype),
            WIDE=is_wide(self.operands.values(), max(tile.M, tile.N), max(width, tile.features, tile.N)),
        )
        return tile, constants

    def targets(self, need_query: bool, need_rows: bool) -> tuple[Rows, Tensor | None, Tensor | None]:
        """((shift, inverse) per target, dquery, dbias per target)."""
        from .device.gradients import targets_kernel

        tile, constants = self._configuration("targets")
        everywhere = tuple(True for _ in self.batches.sizes)
        # neighbours in memory also where the batch is packed: the other kernels load them in every tile
        sizes = (*self.batches.sizes, self.T)
        made = (self._operand(torch.empty(sizes, dtype=torch.float32, device=self.query.device)) for _ in range(2))
        shift = None if self.exact else next(made)
        inverse = self.operands["inverse"] or next(made)
        dquery = row_sums = None
        if need_query:
            dquery = self._empty(everywhere, self.T, self.query.size(-1), dtype=self._dtype(self.query, everywhere))
        if need_rows:
            row_sums = self._empty(everywhere, self.T, dtype=torch.float32)
        tiles = tile_count(self.T, tile.M, self.sequences if self.packed else None)
        Launch(
            targets_kernel,
            tiles * self.batches.count,
            dict(
                **self.operands | dict(inverse=inverse),
                shift=shift,
                eps=self.eps,
                dquery=self._operand(dquery),
                dbias=self._operand(row_sums),
                lists=self._lists(tile, over_targets=False),
                lead=(*self.batches.sizes[1:], self.batches.count),
                T=self.T,
                S=self.S,
                sequences=self.sequences,
                tiles=tiles,
                cu_seqlens_q=self.cu_seqlens_q,
                cu_seqlens_k=self.cu_seqlens_k,
                seed=self.seed,
                **self.options,
            ),
            dict(
                **constants,
                SCALED=self._scaled(),
                TOLERANCE=_TOLERANCE[self.query.dtype],
            ),
            tile,
        ).run()
        if row_sums is not None:
            row_sums = self._finish(row_sums[..., None], self.bias, everywhere)
        return (shift or self.operands["delta"], inverse), self._finish(dquery, self.query, everywhere), row_sums

    def sources(
        self, rows: Rows, need_key: bool, need_value: bool, need_columns: bool, value_dtype: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dkey, dvalue, dbias per source)."""
        tile, constants = self._configuration("sources")
        owners = [self.key, self.value, self.bias if need_columns else None]
        kept = tuple(any(flags) for flags in zip(*(self.batches.owns(t) for t in owners), strict=True))
        dkey = dvalue = column_sums = None
        if need_key:
            dkey = self._empty(kept, self.S, self.key.size(-1), dtype=self._dtype(self.key, kept))
        if need_value and self.value is not None:
            dtype = value_dtype or self._dtype(self.value, kept)
            dvalue = self._empty(kept, self.S, self.value.size(-1), dtype=dtype)
        if need_columns:
            column_sums = self._empty(kept, self.S, dtype=torch.float32)
        launch = (tile, constants, kept, rows)
        narrow = self.value is None or self.value.size(-1) <= tile.features
        if narrow and (dkey is not None or column_sums is not None or dvalue is not None):
            self._sources(*launch, dkey, dvalue, column_sums, 1)
        elif not narrow:
            if dkey is not None or column_sums is not None:
                self._sources(*launch, dkey, None, column_sums, 1)
            if dvalue is not None and self.value is not None:
                chunks = (self.value.size(-1) + tile.features - 1) // tile.features
                self._sources(*launch, None, dvalue, None, chunks)
        sums = None if column_sums is None else self._finish(column_sums[..., None, :], self.bias, kept)
        return self._finish(dkey, self.key, kept), self._finish(dvalue, self.value, kept, dtype=value_dtype), sums

    def _sources(
        self,
        tile: Configuration,
        constants: dict[str, Any],
        kept: tuple[bool, ...],
        rows: Rows,
        dkey: Tensor | None,
        dvalue: Tensor | None,
        column_sums: Tensor | None,
        chunks: int,
    ) -> None:
        from .device.gradients import sources_kernel

        owned = [n if k else 1 for n, k in zip(self.batches.sizes, kept, strict=True)]
        repeats = tuple(1 if k else n for n, k in zip(self.batches.sizes, kept, strict=True))
        owners = owned[0] * owned[1] * owned[2]
        tiles = tile_count(self.S, tile.N, self.sequences if self.packed else None)
        Launch(
            sources_kernel,
            tiles * owners * chunks,
            dict(
                **self._inputs(),
                shift=rows[0],
                inverse=rows[1],
                dkey=self._operand(dkey),
                dvalue=self._operand(dvalue),
                dbias=self._operand(column_sums),
                lists=self._lists(tile, over_targets=True),
                lead=(*self.batches.sizes[1:], self.batches.count),
                kept_lead=(*owned[1:], owners),
                repeats=repeats,
                T=self.T,
                S=self.S,
                sequences=self.sequences,
                tiles=tiles,
                cu_seqlens_q=self.cu_seqlens_q,
                cu_seqlens_k=self.cu_seqlens_k,
                seed=self.seed,
                **self.options,
            ),
            dict(**constants, SCALED=self._scaled()),
            tile,
        ).run()

    def pairs(self, rows: Rows) -> Tensor | None:
        """dbias for every pair."""
        from .device.gradients import pairs_kernel

        assert self.bias is not None
        tile, constants = self._configuration("pairs")
        kept = self.batches.owns(self.bias)
        dbias = self._empty(kept, self.T, self.S, dtype=self.bias.dtype)
        owned = [n if k else 1 for n, k in zip(self.batches.sizes, kept, strict=True)]
        repeats = tuple(1 if k else n for n, k in zip(self.batches.sizes, kept, strict=True))
        row_tiles, columns = (self.T + tile.M - 1) // tile.M, (self.S + tile.N - 1) // tile.N
        Launch(
            pairs_kernel,
            row_tiles * columns * owned[0] * owned[1] * owned[2],
            dict(
                **self._inputs(),
                shift=rows[0],
                inverse=rows[1],
                dbias=self._operand(dbias),
                lead=(*self.batches.sizes[1:], self.batches.count),
                kept_lead=(*owned[1:], owned[0] * owned[1] * owned[2]),
                repeats=repeats,
                T=self.T,
                S=self.S,
                tiles=columns,
                seed=self.seed,
                **self.options,
            ),
            constants,
            tile,
        ).run()
        return self._finish(dbias, self.bias, kept)
