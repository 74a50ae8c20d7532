"""The formulation of the released GLoMo code: every T x S tensor in memory, causality as a product with a mask, running
products of the graphs as matrices. Plain PyTorch, written anew."""

from __future__ import annotations

import torch
from torch import Tensor


def authors_affinity(query: Tensor, key: Tensor, bias: Tensor, causal: bool = True, eps: float = 1e-6) -> Tensor:
    """Graphs (..., T, S); causal means strictly earlier sources."""
    scores = torch.matmul(query, key.transpose(-1, -2))
    scores = (scores + bias).clamp(min=0.0)
    if causal:
        scores = scores * torch.ones_like(scores[0, 0]).tril(-1)
    squares = scores.pow(2)
    return squares / (squares.sum(dim=-1, keepdim=True) + eps)


def authors_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, causal: bool = True, eps: float = 1e-6
) -> Tensor:
    return torch.matmul(authors_affinity(query, key, bias, causal, eps), value)


def authors_mix(
    graphs: Tensor, features: Tensor, weights: Tensor, chain_weights: Tensor | None, num_heads: int
) -> Tensor:
    """Running products materialised, mixed, then one product with the features. graphs (B, N, T, S), weights (N,)."""
    mixed = torch.einsum("n,bnts->bts", weights, graphs)
    if chain_weights is not None:
        layers = graphs.unflatten(1, (-1, num_heads)).unbind(1)
        products = [layers[0]]
        for layer in layers[1:]:
            products.append(torch.matmul(layer, products[-1]))
        mixed = mixed + torch.einsum("n,bnts->bts", chain_weights, torch.cat(products, 1))
    return torch.matmul(mixed, features)


def authors_graph_mix(
    query: Tensor,
    key: Tensor,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor,
    num_heads: int,
    causal: bool = True,
) -> Tensor:
    """The same from queries and keys (B, N, T, E)."""
    return authors_mix(authors_affinity(query, key, bias, causal), features, weights, chain_weights, num_heads)
