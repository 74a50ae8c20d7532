"""relu2_attention on Triton, the host's side: outputs, operands and the launch. Packed batches are the same kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import at_least_2d, broadcast
from ..configurations import Configuration, block, configuration, precision, weight
from ..launch import (
    Launch,
    Lead,
    Operand,
    TooManyDimensions,
    at_addresses,
    diagonal_within,
    dropout_numbers,
    expand_all,
    is_wide,
    kind_of,
    layout,
    remembered,
    tile_count,
)
from ..triton_backward import score_gradients
from ..triton_lists import GRANULE, blocks, mask_states, tile_lists

SKIP_FROM = 1 << 20
"""Pairs (T S) from which on tiles without a positive score are skipped and remembered, where there is a bias to make
them so. Below, finding them costs more than it saves."""


def active_shape(lead: torch.Size, query: Tensor, key: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """Shape of the third output: which blocks of pairs have a positive score. Whether it is used is not asked here,
    which would pin dynamic shapes to one side of SKIP_FROM."""
    return (0,) if bias is None else (*lead, blocks(query.size(-2)), blocks(key.size(-2)))


def skips_tiles(query: Tensor, key: Tensor, bias: Tensor | None) -> bool:
    return bias is not None and query.size(-2) * key.size(-2) >= SKIP_FROM


def relu2_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, Z, active blocks)."""
    lead = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    out = query.new_empty(*lead, query.size(-2), value.size(-1))
    normalizer = torch.empty(out.shape[:-1], dtype=torch.float32, device=query.device)
    active = query.new_zeros(active_shape(lead, query, key, bias), dtype=torch.int8)
    used = active if skips_tiles(query, key, bias) else None
    inputs = [query, key, value, at_least_2d(bias), at_least_2d(attn_mask)]
    rest = (None, None, seed, out, normalizer, used, dropout_p, diagonal, scale, eps)
    try:
        _forward(lead, inputs, *rest)
    except TooManyDimensions:
        _forward(lead, expand_all(lead, inputs), *rest)
    return out, normalizer, active


def relu2_attention_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    eps: float,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and bias."""
    (dout, dnormalizer), (out, normalizer, active) = grad_outputs, outputs
    if not skips_tiles(query, key, bias):
        active = active.new_empty(0)
    return score_gradients(
        dout, dnormalizer, out, normalizer, active, query, key, value, bias, attn_mask, None, None, seed,
        dropout_p, diagonal, scale, eps, needs,
    )  # fmt: skip


def relu2_attention_varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """query (total_q, ..., E), key (total_k, ..., E), value (total_k, ..., Ev); what lies between broadcasts.
    bias (total_q or 1, total_k or 1, ...)."""
    out = query.new_empty(*query.shape[:-1], value.size(-1))
    normalizer = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    inputs = [query.movedim(0, -2), key.movedim(0, -2), value.movedim(0, -2), _pairs(bias), None]
    views = (out.movedim(0, -2), normalizer.movedim(0, -1), None)
    _forward(query.shape[1:-1], inputs, cu_seqlens_q, cu_seqlens_k, seed, *views, dropout_p, diagonal, scale, eps)
    return out, normalizer


def relu2_attention_varlen_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    eps: float,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and bias."""
    (dout, dnormalizer), (out, normalizer) = grad_outputs, outputs
    gradients = score_gradients(
        dout.movedim(0, -2), dnormalizer.movedim(0, -1), out.movedim(0, -2), normalizer.movedim(0, -1),
        query.new_empty(0), query.movedim(0, -2), key.movedim(0, -2), value.movedim(0, -2),
        _pairs(bias), None, cu_seqlens_q, cu_seqlens_k, seed,
        dropout_p, diagonal, scale, eps, needs,
    )  # fmt: skip
    back = [((-2,), (0,))] * 3 + [((-2, -1), (0, 1))]
    return [g.movedim(*m).contiguous() if need else g for g, m, need in zip(gradients, back, needs, strict=True)]


def _pairs(bias: Tensor | None) -> Tensor | None:
    """(..., total_q or 1, total_k or 1) of a packed bias."""
    return None if bias is None else bias.movedim((0, 1), (-2, -1))


class _Plan(NamedTuple):
    """What a forward launch needs besides the tensors."""

    batches: Lead
    operands: dict[str, Operand | None]
    tile: Configuration
    programs: int
    numbers: dict[str, Any]
    constants: dict[str, Any]


_PLANS: dict[Any, _Plan] = {}


def _forward(
    lead: torch.Size,
    inputs: list[Tensor | None],
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    active: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> None:
    from ..device.relu2_attention import forward_kernel

    query, key, value, bias, attn_mask = inputs
    assert query is not None and key is not None and value is not None
    tensors = dict(query=query, key=key, value=value, bias=bias, mask=attn_mask)
    tensors |= dict(out=out, normalizer=normalizer, active=active)
    options = (dropout_p, diagonal, scale, eps, seed is not None, precision(query.dtype))
    known = (lead, layout(*inputs, cu_seqlens_q), active is not None, options)  # the outputs' layout follows from these
    plan = remembered(_PLANS, known, lambda: _prepare(lead, tensors, cu_seqlens_q, *options))
    operands = at_addresses(plan.operands, tensors)
    lists = None
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
) -> _Plan:
    query, key, value, bias, mask = (tensors[name] for name in ("query", "key", "value", "bias", "mask"))
    assert query is not None and key is not None and value is not None
    T, S = query.size(-2), key.size(-2)
    whole = [(t, 1 if name == "normalizer" else 2) for name, t in tensors.items() if t is not None and name != "active"]
    batches = Lead(lead, whole)
    views = {name: batches.optional(t, 1 if name == "normalizer" else 2) for name, t in tensors.items()}
    kind, width, packed = kind_of(bias, scalars=True), block(query.size(-1)), cu_seqlens is not None
    masked = mask is not None or tensors["active"] is not None
    tile = configuration("relu2_attention", query, value.size(-1), weight(diagonal, packed, kind, masked, dropout))
    sequences = 0 if cu_seqlens is None else cu_seqlens.size(0) - 1
    tiles = tile_count(T, tile.M, sequences if packed else None)
    chunks = max((value.size(-1) + tile.features - 1) // tile.features, 1)
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
    constants = dict(
        WIDTH=query.size(-1),
        CHECK_T=packed or T % tile.M != 0,
        FEATURES=value.size(-1),
        M=tile.M,
        N=tile.N,
        E=width,
        F=tile.features,
        BIAS=kind,
        MASK=kind_of(mask, scalars=False),
        CAUSAL=diagonal is not None,
        SCALE=scale != 1.0,
        SCALED=query.dtype != torch.bfloat16,
        FLAG_ROWS=tile.M // GRANULE,
        FLAG_COLUMNS=tile.N // GRANULE,
        PRECISION=precision,
        WIDE=is_wide(views.values(), max(tile.M, tile.N), max(width, tile.features, tile.N)),
    )
    operands = {name: None if x is None else x._replace(pointer=None) for name, x in views.items()}
    return _Plan(batches, operands, tile, tiles * batches.count * chunks, numbers, constants)
