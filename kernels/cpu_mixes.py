"""graph_mix and relu2_graph_mix in C++, the host's side."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import broadcast
from .cpu_arguments import BiasSums, gradient_buffer, summed, with_lead

Numbers = tuple[int, int | None, float, float]  # num_heads, diagonal, scale, eps


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
    out = features.new_empty(weights.size(0), *lead, rows.size(-2), features.size(-1))
    torch.ops.glomo_cpu.mix_forward(
        *_inputs(lead, graphs, query, key, features, weights, chain_weights, bias, attn_mask), out, *numbers
    )
    return out


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
    mixtures = (weights.size(0), *lead)
    pairs = (*lead, weights.size(-1))
    tensors = graphs, query, key, features, weights, chain_weights
    leads = pairs, pairs, pairs, lead, mixtures, mixtures
    made = [gradient_buffer(t, size, need) for t, size, need in zip(tensors, leads, needs, strict=False)]
    T = dout.size(-2)
    for i in (4, 5):  # per target, whatever the weights are
        if made[i] is not None:
            made[i] = weights.new_zeros(*mixtures, T, weights.size(-1))
    sums = BiasSums(bias, pairs, query, key) if needs[6] and query is not None and key is not None else None
    torch.ops.glomo_cpu.mix_backward(
        dout,
        *_inputs(lead, graphs, query, key, features, weights, chain_weights, bias, attn_mask),
        *made,
        *(sums.outputs if sums else (None, None, None)),
        *numbers,
    )
    gradients = [summed(g, t, features) for g, t in zip(made, tensors, strict=True)]
    return [*gradients, summed(sums.total if sums else None, bias, features)]


def _inputs(
    lead: torch.Size,
    graphs: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
) -> list[Tensor | None]:
    pairs, mixtures = (*lead, weights.size(-1)), (weights.size(0), *lead)
    return [
        *with_lead(pairs, graphs, query, key),
        *with_lead(lead, features),
        *with_lead(mixtures, weights, chain_weights),
        *with_lead(pairs, bias, attn_mask),
    ]
