"""relu2_attention on Triton, the host's side: outputs, operands and the launch. Packed batches are the same kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..configurations import block, configuration, weight
from ..launch import (
    Launch,
    Lead,
    TooManyDimensions,
    at_least_2d,
    diagonal_within,
    expand_all,
    is_wide,
    kind_of,
    precision,
)
from ..triton_backward import score_gradients
from ..triton_lists import blocks, mask_states, tile_lists

SKIP_FROM = 1 << 20
"""Pairs (T S) from which on tiles without a positive score are skipped and remembered, where there is a bias to make
them so. Below, finding them costs more than it saves."""


def active_shape(lead: torch.Size, query: Tensor, key: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """Shape of the third output: which blocks of pairs have a positive score, where that is remembered."""
    if bias is None or query.size(-2) * key.size(-2) < SKIP_FROM:
        return (0,)
    return (*lead, blocks(query.size(-2)), blocks(key.size(-2)))


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
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    out = query.new_empty(*lead, query.size(-2), value.size(-1))
    normalizer = torch.empty(out.shape[:-1], dtype=torch.float32, device=query.device)
    active = torch.zeros(active_shape(lead, query, key, bias), dtype=torch.int8, device=query.device)
    inputs = [query, key, value, at_least_2d(bias), at_least_2d(attn_mask)]
    rest = (None, None, seed, out, normalizer, active, dropout_p, diagonal, scale, eps)
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
    return score_gradients(
        *grad_outputs, *outputs, query, key, value, bias, attn_mask, None, None, seed,
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
    views = (out.movedim(0, -2), normalizer.movedim(0, -1), query.new_empty(0))
    _forward(
        query.shape[1:-1], inputs, cu_seqlens_q, cu_seqlens_k, seed, *views, dropout_p, diagonal, scale, eps
    )
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


def _forward(
    lead: torch.Size,
    inputs: list[Tensor | None],
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    active: Tensor,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> None:
    from ..device.relu2_attention import forward_kernel

    query, key, value, bias, attn_mask = inputs
    assert query is not None and key is not None and value is not None
    T, S = query.size(-2), key.size(-2)
    batches = Lead(lead, [*((t, 2) for t in (*inputs, out) if t is not None), (normalizer, 1)])
    width = block(query.size(-1))
    kind = kind_of(bias, scalars=True)
    masked = attn_mask is not None or active.numel() > 0
    heavy = weight(diagonal, cu_seqlens_q is not None, kind, masked, seed is not None)
    tile = configuration("relu2_attention", query, value.size(-1), heavy)
    lists = None
    if attn_mask is not None:
        lists = tile_lists(mask_states(batches, attn_mask, T, S, diagonal), T, S, tile.M, tile.N)
    views = [batches.optional(t) for t in (*inputs, out)]
    sequences = 0 if cu_seqlens_q is None else cu_seqlens_q.size(0) - 1
    tiles = (T + tile.M - 1) // tile.M if cu_seqlens_q is None else T // tile.M + sequences
    chunks = max((value.size(-1) + tile.features - 1) // tile.features, 1)
    Launch(
        forward_kernel,
        tiles * batches.count * chunks,
        dict(
            zip(("query", "key", "value", "bias", "mask", "out"), views, strict=True),
            normalizer=batches.operand(normalizer, 1),
            active=batches.operand(active) if active.numel() else None,
            lists=lists,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seed=seed,
            lead=(*batches.sizes[1:], batches.count),
            T=T,
            S=S,
            sequences=sequences,
            tiles=tiles,
            diagonal=diagonal_within(diagonal, T, S),
            scale=scale,
            eps=eps,
            threshold=round(dropout_p * 2**32),
            keep_scale=1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        ),
        dict(
            WIDTH=query.size(-1),
            CHECK_T=cu_seqlens_q is not None or T % tile.M != 0,
            FEATURES=value.size(-1),
            M=tile.M,
            N=tile.N,
            E=width,
            F=tile.features,
            BIAS=kind,
            MASK=kind_of(attn_mask, scalars=False),
            CAUSAL=diagonal is not None,
            SCALE=scale != 1.0,
            SCALED=query.dtype != torch.bfloat16,
            FLAG_ROWS=tile.M // 32,
            FLAG_COLUMNS=tile.N // 32,
            PRECISION=precision(query.dtype),
            WIDE=is_wide(views, max(tile.M, tile.N), max(width, tile.features, tile.N)),
        ),
        tile,
    ).run()
