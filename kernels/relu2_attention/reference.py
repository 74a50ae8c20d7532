"""The definition of relu2_attention in plain PyTorch: the affinity, dropout, times the value."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import accumulator_dtype, without_autocast
from ..philox import keep_mask
from ..relu2_affinity.reference import affinity_and_normalizer
from ..varlen import sequences


def drop(weights: Tensor, seed: Tensor | None, dropout_p: float, first_batch_head: int = 0) -> Tensor:
    """Dropout on weights (..., T, S): kept ones are divided by 1 - dropout_p. The flat batch-head index of a
    slice of the leading dimensions is its position, counted from first_batch_head."""
    if seed is None:
        return weights
    lead = weights.shape[:-2]
    batch_heads = torch.arange(lead.numel(), device=weights.device).view(lead) + first_batch_head
    keep = keep_mask(seed, dropout_p, batch_heads, range(weights.size(-2)), weights.size(-1))
    return weights.where(keep, 0) / (1 - dropout_p) if dropout_p < 1 else weights * 0


def relu2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    eps: float,
    first_batch_head: int = 0,
) -> tuple[Tensor, Tensor]:
    """out (..., T, Ev) in the query's dtype and Z (..., T) in the accumulator's."""
    with without_autocast(query.device):
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        query = query.expand(*lead, *query.shape[-2:])
        weights, normalizer = affinity_and_normalizer(query, key, bias, attn_mask, diagonal, scale, eps)
        weights = drop(weights, seed, dropout_p, first_batch_head)
        out = weights.to(value.dtype) @ value
    return out, normalizer


def relu2_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence: query (total_q, ..., E), key (total_k, ..., E), value (total_k, ..., Ev); what lies between
    broadcasts. bias (total_q or 1, total_k or 1, ...)."""
    outs, normalizers = [], []
    for sequence in sequences(cu_seqlens_q, cu_seqlens_k, query, key):
        q, k, v, b = sequence.targets(query), sequence.sources(key), sequence.sources(value), sequence.pairs(bias)
        out, normalizer = relu2_attention(
            q, k, v, b, None, seed, dropout_p, diagonal, scale, eps, sequence.first_batch_head
        )
        outs.append(out.movedim(-2, 0))
        normalizers.append(normalizer.movedim(-1, 0))
    empty = query.new_zeros(0, *query.shape[1:-1], value.size(-1))
    return torch.cat([empty, *outs]), torch.cat([empty.sum(-1).to(accumulator_dtype(query.dtype)), *normalizers])
