"""relu2_attention and attention on Triton, the host's side of the forward pass: outputs, operands and the launch.
Packed batches are the same kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import at_least_2d, broadcast
from .configurations import Configuration, block, configuration, precision, two_blocks, weight
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
from .triton_lists import GRANULE, mask_states, tile_lists

Numbers = tuple[float, int | None, float, float]  # dropout_p, diagonal, scale, eps


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    numbers: Numbers,
    softmax: bool,
    active: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(out, Z), for softmax (out, sum of exp(s - peak), lse, peak). `active` takes the blocks with a positive score."""
    lead = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    out = query.new_empty(*lead, query.size(-2), value.size(-1))
    statistics = _statistics(out, softmax)
    inputs = [query, key, value, at_least_2d(bias), at_least_2d(attn_mask)]
    outputs = dict(out=out, **statistics, active=active)
    try:
        attend(lead, inputs, outputs, numbers, seed)
    except TooManyDimensions:
        attend(lead, expand_all(lead, inputs), outputs, numbers, seed)
    return out, *statistics.values()


def packed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    numbers: Numbers,
    softmax: bool,
) -> tuple[Tensor, ...]:
    """query (total_q, ..., E), key (total_k, ..., E), value (total_k, ..., Ev); what lies between broadcasts.
    bias (total_q or 1, total_k or 1, ...)."""
    out = query.new_empty(*query.shape[:-1], value.size(-1))
    statistics = _statistics(out, softmax)
    inputs = [query.movedim(0, -2), key.movedim(0, -2), value.movedim(0, -2), packed_pairs(bias), None]
    views = dict(out=out.movedim(0, -2)) | {name: t.movedim(0, -1) for name, t in statistics.items()}
    attend(query.shape[1:-1], inputs, views, numbers, seed, (cu_seqlens_q, cu_seqlens_k))
    return out, *statistics.values()


def packed_pairs(bias: Tensor | None) -> Tensor | None:
    """(..., total_q or 1, total_k or 1) of a packed bias."""
    return None if bias is None else bias.movedim((0, 1), (-2, -1))


def _statistics(out: Tensor, softmax: bool) -> dict[str, Tensor]:
    names = ("normalizer", "lse", "peak") if softmax else ("normalizer",)
    return {name: torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device) for name in names}


class _Plan(NamedTuple):
    """What a forward launch needs besides the tensors."""

    batches: Lead
    operands: dict[str, Operand | None]
    tile: Configuration
    programs: int
    numbers: dict[str, Any]
    constants: dict[str, Any]


_PLANS: dict[Any, _Plan] = {}
_STATISTICS = ("normalizer", "inverse", "lse", "peak")
_OUTPUTS = ("out", *_STATISTICS, "active")


def attend(
    lead: torch.Size,
    inputs: Sequence[Tensor | None],
    outputs: dict[str, Any],
    numbers: Numbers,
    seed: Tensor | None = None,
    sequences: tuple[Tensor | None, Tensor | None] = (None, None),
    tile: Configuration | None = None,
) -> None:
    """Fills those outputs that there are, of out, normalizer, inverse = 1 / (Z + eps), active, and softmax's lse and
    peak, from query, key, value (None if only statistics are wanted), bias and mask."""
    from .device.attention import forward_kernel

    query, key, value, bias, attn_mask = inputs
    assert query is not None and key is not None
    cu_seqlens_q, cu_seqlens_k = sequences
    tensors = dict(query=query, key=key, value=value, bias=bias, mask=attn_mask)
    tensors |= dict.fromkeys(_OUTPUTS) | outputs
    options = (*numbers, seed is not None, precision(query.dtype), tile)
    known = (lead, layout(*inputs, cu_seqlens_q, *(tensors[name] for name in _OUTPUTS)), options)
    plan = remembered(_PLANS, known, lambda: _prepare(lead, tensors, cu_seqlens_q, *options))
    operands = at_addresses(plan.operands, tensors)
    diagonal, lists = numbers[1], None
    if attn_mask is not None:
        T, S = query.size(-2), key.size(-2)
        lists = tile_lists(mask_states(plan.batches, attn_mask, T, S, diagonal), T, S, plan.tile.M, plan.tile.N)
    varying = dict(lists=lists, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seed=seed)
    Launch(forward_kernel, plan.programs, {**operands, **varying, **plan.numbers}, plan.constants, plan.tile).run()


def _prepare(
    lead: torch.Size,
    tensors: dict[str, Tensor | None],
    cu_seqlens: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    eps: float,
    dropout: bool,
    precision: str,
    tile: Configuration | None,
) -> _Plan:
    query, key, value, bias, mask = (tensors[name] for name in ("query", "key", "value", "bias", "mask"))
    assert query is not None and key is not None
    T, S, features = query.size(-2), key.size(-2), 0 if value is None else value.size(-1)
    softmax = tensors["peak"] is not None
    tails = {name: 1 if name in _STATISTICS else 2 for name in tensors}
    batches = Lead(lead, [(t, tails[name]) for name, t in tensors.items() if t is not None and name != "active"])
    views = {name: batches.optional(t, tails[name]) for name, t in tensors.items()}
    kind, width, packed = kind_of(bias, scalars=True), block(query.size(-1)), cu_seqlens is not None
    masked = mask is not None or tensors["active"] is not None
    name = "attention" if softmax else "relu2_attention"
    heavy = weight(diagonal, packed, kind, masked, dropout, query, value)
    tile = tile or configuration(name, query, block(features), heavy)
    sequences = 0 if cu_seqlens is None else cu_seqlens.size(0) - 1
    tiles = tile_count(T, tile.M, sequences if packed else None)
    widths = two_blocks(min(features, tile.features))
    if tensors["active"] is not None:  # where tiles are skipped, the product is behind a branch, and only one
        widths["G"] = 0
    across = widths["F"] + widths["G"]
    chunks = max((features + across - 1) // across, 1)
    numbers = dict(
        lead=(*batches.sizes[1:], batches.count),
        T=T,
        S=S,
        sequences=sequences,
        tiles=tiles,
        diagonal=diagonal_within(diagonal, T, S),
        scale=scale,
        eps=eps,
        **dropout_numbers(dropout_p),
    )
    folded = is_folded(softmax, kind, scale)
    constants = dict(
        WIDTH=query.size(-1),
        CHECK_T=packed or T % tile.M != 0,
        FEATURES=features,
        M=tile.M,
        N=tile.N,
        E=width,
        **widths,
        BIAS=kind,
        MASK=kind_of(mask, scalars=False),
        CAUSAL=diagonal is not None,
        SCALE=scale != 1.0 and not folded,
        FOLDED=folded,
        SCALED=query.dtype != torch.bfloat16 and not softmax,
        FLAG_ROWS=tile.M // GRANULE,
        FLAG_COLUMNS=tile.N // GRANULE,
        PRECISION=precision,
        WIDE=is_wide(views.values(), max(tile.M, tile.N), max(width, across, tile.N)),
    )
    operands = {name: None if x is None else x._replace(pointer=None) for name, x in views.items()}
    return _Plan(batches, operands, tile, tiles * batches.count * chunks, numbers, constants)
