"""attention on Triton."""

from __future__ import annotations

from torch import Tensor

from .. import triton_attention
from ..arguments import bias_and_mask
from ..triton_backward import packed_gradients, score_gradients


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, sum of exp(s - peak), peak): a large lse absorbs the log of the sum, and the gradient needs both."""
    numbers = dropout_p, diagonal, scale, 0.0
    arguments = query, key, value, *bias_and_mask(attn_mask), seed, numbers
    out, total, lse, peak = triton_attention.forward(*arguments, softmax=True)
    return out, lse, total, peak


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
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and a float attn_mask."""
    out, _, total, peak = outputs
    arguments = query, key, value, *bias_and_mask(attn_mask), seed, (dropout_p, diagonal, scale, 0.0)
    rows = dict(normalizer=total, dnormalizer=grad_outputs[1], peak=peak)
    return score_gradients(grad_outputs[0], out, rows, *arguments, needs)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As attention_forward."""
    arguments = query, key, value, cu_seqlens_q, cu_seqlens_k, None, seed, (dropout_p, diagonal, scale, 0.0)
    out, total, lse, peak = triton_attention.packed_forward(*arguments, softmax=True)
    return out, lse, total, peak


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
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key and value."""
    out, _, total, peak = outputs
    arguments = query, key, value, cu_seqlens_q, cu_seqlens_k, None, seed, (dropout_p, diagonal, scale, 0.0)
    rows = dict(normalizer=total, dnormalizer=grad_outputs[1], peak=peak)
    return packed_gradients(grad_outputs[0], out, rows, *arguments, [*needs, False])[:3]
