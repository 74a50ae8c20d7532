"""graph_mix and relu2_graph_mix in C++, the host's side."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import broadcast
from .cpu_arguments import BiasSums, gradient_buffer, summed, with_lead

Numbers = tuple[int, int | None, float, float]  # num_heads, diagonal, scale, eps
LONGEST_MATRIX = 1024
"""Positions of the longest sequence whose running products are kept as matrices: 4 MB each."""


def as_matrices(positions: int, width: int, dim: int, diagonal: int | None) -> bool:
    """Whether running products of graphs are formed as matrices, and not times features of that width.

    A product of two triangles costs a third of a triangle times a matrix. Chains times features leave the mixture of
    graphs to a pass of its own, which computes the scores of `dim` columns again, and are slower by the measured factor
    (bench/NOTES.md).
    """
    columns = positions if diagonal is None or diagonal > 0 else positions / 3
    return positions <= LONGEST_MATRIX and columns <= 1.4 * (width + dim)


def forward(
    graphs: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    numbers: Numbers,
) -> Tensor:
    """out (M, ..., T, Ef), from graphs (..., N, T, S) or from query (..., N, T, E) and key (..., N, S, E)."""
    given = [t.shape[:-3] for t in (graphs, query, key) if t is not None]
    lead = broadcast(*given, features.shape[:-2])
    rows = graphs if query is None else query
    assert rows is not None
    shape = (weights.size(0), *lead, rows.size(-2), features.size(-1))
    passes = _passes(query, features, weights, chain_weights, numbers)
    total: Tensor | None = None
    for w, c, matrices in passes:
        out = features.new_empty(shape, dtype=features.dtype if len(passes) == 1 else torch.float32)
        tensors = _inputs(lead, weights.size(-1), graphs, query, key, features, w, c, bias, attn_mask)
        torch.ops.glomo_cpu.mix_forward(*tensors, out, numbers[0], matrices, *numbers[1:])
        total = out if total is None else total.add_(out)
    assert total is not None
    return total.to(features.dtype)


def backward(
    dout: Tensor,
    graphs: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    numbers: Numbers,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of graphs, query, key, features, weights, chain_weights and bias."""
    lead = dout.shape[1:-2]
    pairs, mixtures = (*lead, weights.size(-1)), (weights.size(0), *lead)
    passes = _passes(query, features, weights, chain_weights, numbers)
    totals: list[Tensor | None] = [None] * 7
    for w, c, matrices in passes:
        tensors = graphs, query, key, features, w, c
        made = [
            gradient_buffer(t, size, need, wide=len(passes) > 1)
            for t, size, need in zip(tensors, (pairs, pairs, pairs, lead), needs, strict=False)
        ]
        for t, need in zip((w, c), needs[4:6], strict=True):  # per target, whatever the weights are
            made.append(
                weights.new_zeros(*mixtures, dout.size(-2), weights.size(-1)) if need and t is not None else None
            )
        sums = BiasSums(bias if needs[6] else None, pairs, rows=dout.size(-2), columns=features.size(-2), like=features)
        inputs = _inputs(lead, weights.size(-1), *tensors, bias, attn_mask)
        torch.ops.glomo_cpu.mix_backward(dout, *inputs, *made, *sums.outputs, numbers[0], matrices, *numbers[1:])
        for i, gradient in enumerate([*made, sums.total]):
            before = totals[i]
            totals[i] = gradient if before is None else before if gradient is None else before.add_(gradient)
    wanted = (graphs, query, key, features, weights, chain_weights, bias)
    return [summed(g, t, features) for g, t in zip(totals, wanted, strict=True)]


def _passes(
    query: Tensor | None, features: Tensor, weights: Tensor, chain_weights: Tensor | None, numbers: Numbers
) -> list[tuple[Tensor | None, Tensor | None, bool]]:
    """(weights, chain_weights, whether chains are matrices) of each pass over the graphs."""
    dim = 0 if query is None else query.size(-1)
    if chain_weights is None or as_matrices(features.size(-2), features.size(-1), dim, numbers[1]):
        return [(weights, chain_weights, True)]
    return [(weights, None, False), (None, chain_weights, False)]


def _inputs(
    lead: torch.Size,
    n: int,
    graphs: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    features: Tensor,
    weights: Tensor | None,
    chain_weights: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
) -> list[Tensor | None]:
    mixtures = next((t.size(0), *lead) for t in (weights, chain_weights) if t is not None)
    return [
        *with_lead((*lead, n), graphs, query, key),
        *with_lead(lead, features),
        *with_lead(mixtures, weights, chain_weights),
        *with_lead((*lead, n), bias, attn_mask),
    ]
