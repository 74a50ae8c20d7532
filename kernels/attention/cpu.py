"""attention in C++."""

from __future__ import annotations

from torch import Tensor

from .. import cpu_attention
from ..arguments import bias_and_mask
from ..cpu_attention import SOFTMAX


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    save: bool,
    inside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, residual, active tiles, correction): cpu_attention.forward."""
    numbers = dropout_p, diagonal, scale, 0.0
    return cpu_attention.forward(SOFTMAX, query, key, value, *bias_and_mask(attn_mask), seed, numbers, save, inside)


def attention_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    save: bool,
    inside: bool,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and a float attn_mask."""
    arguments = query, key, value, *bias_and_mask(attn_mask), seed, (dropout_p, diagonal, scale, 0.0)
    return cpu_attention.backward(SOFTMAX, grad_outputs, outputs, *arguments, needs, inside)


def attention_varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, residual, correction): cpu_attention.packed_forward."""
    arguments = query, key, value, cu_seqlens_q, cu_seqlens_k, None, seed, (dropout_p, diagonal, scale, 0.0)
    return cpu_attention.packed_forward(SOFTMAX, *arguments, save)


def attention_varlen_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    save: bool,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key and value."""
    arguments = query, key, value, cu_seqlens_q, cu_seqlens_k, None, seed, (dropout_p, diagonal, scale, 0.0)
    return cpu_attention.packed_backward(SOFTMAX, grad_outputs, outputs, *arguments, [*needs, False])[:3]
