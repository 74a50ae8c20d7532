"""relu2_attention on Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import triton_attention
from ..triton_backward import packed_gradients, score_gradients
from ..triton_lists import blocks

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
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    active = query.new_zeros(active_shape(lead, query, key, bias), dtype=torch.int8)
    numbers = dropout_p, diagonal, scale, eps
    used = active if skips_tiles(query, key, bias) else None
    out, normalizer = triton_attention.forward(query, key, value, bias, attn_mask, seed, numbers, False, used)
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
    out, normalizer, active = outputs
    used = active if skips_tiles(query, key, bias) else None
    numbers = dropout_p, diagonal, scale, eps
    rows = dict(normalizer=normalizer, dnormalizer=grad_outputs[1])
    return score_gradients(grad_outputs[0], out, rows, query, key, value, bias, attn_mask, seed, numbers, needs, used)


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
    """(out, Z)."""
    arguments = query, key, value, cu_seqlens_q, cu_seqlens_k, bias, seed, (dropout_p, diagonal, scale, eps)
    out, normalizer = triton_attention.packed_forward(*arguments, softmax=False)
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
    arguments = query, key, value, cu_seqlens_q, cu_seqlens_k, bias, seed, (dropout_p, diagonal, scale, eps)
    rows = dict(normalizer=outputs[1], dnormalizer=grad_outputs[1])
    return packed_gradients(grad_outputs[0], outputs[0], rows, *arguments, needs)
