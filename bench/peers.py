"""What the ops are measured against, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def authors_affinity(query: Tensor, key: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """The formulation of the released GLoMo code: every T x S tensor in memory, causality as a product with a mask."""
    size = query.size(-2)
    scores = torch.matmul(query, key.transpose(-1, -2))
    scores = (scores + bias).clamp(min=0.0)
    scores = scores * torch.ones(size, size, device=query.device).tril(-1)
    squares = scores.pow(2)
    return squares / (squares.sum(dim=-1, keepdim=True) + eps)


def authors_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return torch.matmul(authors_affinity(query, key, bias), value)


def authors_graph_mix(
    query: Tensor,
    key: Tensor,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor,
    num_heads: int,
) -> Tensor:
    """Graphs and running products materialised, mixed, then one product with the features. weights: (N,)."""
    graphs = authors_affinity(query, key, bias)
    mixed = torch.einsum("n,bnts->bts", weights, graphs)
    if chain_weights is not None:
        layers = graphs.unflatten(1, (-1, num_heads)).unbind(1)
        products = [layers[0]]
        for layer in layers[1:]:
            products.append(torch.matmul(layer, products[-1]))
        mixed = mixed + torch.einsum("n,bnts->bts", chain_weights, torch.cat(products, 1))
    return torch.matmul(mixed, features)
