"""The definition of graph_mix in plain PyTorch: the products of graphs as matrices, mixed, then times the features."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import accumulator_dtype, without_autocast


def running_products(graphs: Tensor, num_heads: int) -> Tensor:
    """Lambda (..., N, T, T) of graphs (..., N, T, T), N = layers * heads, layer-major: within a head,
    Lambda_1 = A_1 and Lambda_l = A_l Lambda_{l-1} (matrix products)."""
    layers = graphs.unflatten(-3, (-1, num_heads)).unbind(-4)
    products = [layers[0]]
    for layer in layers[1:]:
        products.append(layer @ products[-1])
    return torch.cat(products, dim=-3)


def mix(graphs: Tensor, weights: Tensor, chain_weights: Tensor | None, num_heads: int) -> Tensor:
    """(M, ..., T, S) of graphs (..., N, T, S) and weights (M, ..., T or 1, N): sum_n w_mn A_n + sum_n c_mn Lambda_n."""
    # (M, ..., T, N) -> (M, ..., N, T, 1), a weight for every row of every graph
    mixed = (weights.mT[..., None] * graphs).sum(-3)
    if chain_weights is not None:
        mixed = mixed + (chain_weights.mT[..., None] * running_products(graphs, num_heads)).sum(-3)
    return mixed


def graph_mix(
    graphs: Tensor, features: Tensor, weights: Tensor, chain_weights: Tensor | None, num_heads: int
) -> Tensor:
    """(M, ..., T, E) in the features' dtype: the mixed graph times the features (..., S, E)."""
    with without_autocast(features.device):
        return (
            mix(graphs.to(accumulator_dtype(graphs.dtype)), weights, chain_weights, num_heads).to(features.dtype)
            @ features
        )
