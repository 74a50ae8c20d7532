"""graph_mix on Triton."""

from __future__ import annotations

from torch import Tensor

from .. import triton_mixes


def graph_mix_forward(
    graphs: Tensor, features: Tensor, weights: Tensor, chain_weights: Tensor | None, num_heads: int
) -> Tensor:
    numbers = num_heads, None, 1.0, 0.0
    return triton_mixes.forward(graphs, None, None, features, weights, chain_weights, None, None, numbers)[0]


def graph_mix_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    graphs: Tensor,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    num_heads: int,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of graphs, features, weights and chain_weights."""
    arguments = graphs, None, None, features, weights, chain_weights, None, None, (num_heads, None, 1.0, 0.0)
    all_needs = [needs[0], False, False, *needs[1:], False]
    dgraphs, _, _, *rest, _ = triton_mixes.backward(grad_outputs[0], None, *arguments, all_needs)
    return [dgraphs, *rest]
