"""The definition of relu2_graph_mix in plain PyTorch: relu2_affinity, then graph_mix."""

from __future__ import annotations

from torch import Tensor

from ..graph_mix.reference import graph_mix
from ..relu2_affinity.reference import affinity_and_normalizer


def relu2_graph_mix(
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
) -> Tensor:
    """(M, ..., T, Ef) of query (..., N, T, E), key (..., N, S, E), features (..., S, Ef), weights (M, ..., T|1, N)."""
    graphs, _ = affinity_and_normalizer(query, key, bias, attn_mask, diagonal, scale, eps)
    return graph_mix(graphs, features, weights, chain_weights, num_heads)
