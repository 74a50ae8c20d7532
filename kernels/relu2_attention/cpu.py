"""relu2_attention in C++."""

from __future__ import annotations

from torch import Tensor

from .. import cpu_attention
from ..cpu_attention import RELU2


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
    save: bool,
    inside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, Z, residual, active tiles): cpu_attention.forward."""
    numbers = dropout_p, diagonal, scale, eps
    return cpu_attention.forward(RELU2, query, key, value, bias, attn_mask, seed, numbers, save, inside)[:4]


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
    save: bool,
    inside: bool,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and bias."""
    arguments = query, key, value, bias, attn_mask, seed, (dropout_p, diagonal, scale, eps)
    return cpu_attention.backward(RELU2, grad_outputs, outputs, *arguments, needs, inside)


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
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, Z, residual): cpu_attention.packed_forward."""
    arguments = query, key, value, cu_seqlens_q, cu_seqlens_k, bias, seed, (dropout_p, diagonal, scale, eps)
    return cpu_attention.packed_forward(RELU2, *arguments, save)[:3]


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
    save: bool,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and bias."""
    arguments = query, key, value, cu_seqlens_q, cu_seqlens_k, bias, seed, (dropout_p, diagonal, scale, eps)
    return cpu_attention.packed_backward(RELU2, grad_outputs, outputs, *arguments, needs)
