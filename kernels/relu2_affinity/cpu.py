"""relu2_affinity in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import broadcast
from ..cpu_arguments import BiasSums, gradient_buffer, summed, with_lead


def relu2_affinity_forward(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> Tensor:
    lead = broadcast(query.shape[:-2], key.shape[:-2])
    out = query.new_empty(*lead, query.size(-2), key.size(-2))
    inputs = with_lead(lead, query, key, bias, attn_mask)
    torch.ops.glomo_cpu.affinity_forward(*inputs, out, diagonal, scale, eps)
    return out


def relu2_affinity_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    diagonal: int | None,
    scale: float,
    eps: float,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key and bias."""
    daffinity = grad_outputs[0]
    lead = daffinity.shape[:-2]
    dquery, dkey = gradient_buffer(query, lead, needs[0]), gradient_buffer(key, lead, needs[1])
    sums = BiasSums(bias if needs[2] else None, lead, query.size(-2), key.size(-2), query)
    inputs = with_lead(lead, query, key, bias, attn_mask)
    torch.ops.glomo_cpu.affinity_backward(daffinity, *inputs, dquery, dkey, *sums.outputs, diagonal, scale, eps)
    return [summed(dquery, query, query), summed(dkey, key, query), summed(sums.total, bias, query)]
