"""relu2_graph_mix on Triton."""

from __future__ import annotations

from torch import Tensor

from .. import triton_mixes


def relu2_graph_mix_forward(
    query: Tensor,
    key: Tensor,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(out, 1 / (Z + eps) of every graph)."""
    numbers = num_heads, diagonal, scale, eps
    return triton_mixes.forward(None, query, key, features, weights, chain_weights, bias, attn_mask, numbers)


def relu2_graph_mix_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
    diagonal: int | None,
    scale: float,
    eps: float,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, features, weights, chain_weights and bias."""
    arguments = query, key, features, weights, chain_weights, bias, attn_mask, (num_heads, diagonal, scale, eps)
    return triton_mixes.backward(grad_outputs[0], outputs[1], None, *arguments, [False, *needs])[1:]
