"""The definition of attention in plain PyTorch: softmax over the allowed sources, times the value."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import accumulator_dtype, without_autocast
from ..relu2_affinity.reference import allowed_pairs
from ..relu2_attention.reference import drop
from ..varlen import sequences


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    first_batch_head: int = 0,
) -> tuple[Tensor, Tensor]:
    """out (..., T, Ev) in the query's dtype and lse (..., T) in the accumulator's.

    A bool mask says what may be read, a float mask is added to the scores. A row that may read nothing has
    out = 0 and lse = -inf, and gets no gradient.
    """
    dtype = accumulator_dtype(query.dtype)
    with without_autocast(query.device):
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        query = query.expand(*lead, *query.shape[-2:])
        scores = query.to(dtype) @ key.to(dtype).mT * scale
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            scores, attn_mask = scores + attn_mask, None
        allowed = allowed_pairs(query, key, attn_mask, diagonal)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        row_max = scores.detach().amax(-1, keepdim=True) if scores.size(-1) else scores.new_zeros(*scores.shape[:-1], 1)
        row_max = row_max.masked_fill(row_max == float("-inf"), 0)
        exponentials = (scores - row_max).exp()
        total = exponentials.sum(-1, keepdim=True)
        empty = total == 0
        positive_total = total.masked_fill(empty, 1)
        lse = (row_max + positive_total.log()).masked_fill(empty, float("-inf")).squeeze(-1)
        weights = drop(exponentials / positive_total, seed, dropout_p, first_batch_head)
        out = weights.to(value.dtype) @ value
    return out, lse


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence: query (total_q, ..., E), key (total_k, ..., E), value (total_k, ..., Ev); what lies between
    broadcasts."""
    outs, lses = [], []
    for sequence in sequences(cu_seqlens_q, cu_seqlens_k, query, key):
        q, k, v = sequence.targets(query), sequence.sources(key), sequence.sources(value)
        out, lse = attention(q, k, v, None, seed, dropout_p, diagonal, scale, sequence.first_batch_head)
        outs.append(out.movedim(-2, 0))
        lses.append(lse.movedim(-1, 0))
    empty = query.new_zeros(0, *query.shape[1:-1], value.size(-1))
    return torch.cat([empty, *outs]), torch.cat([empty.sum(-1).to(accumulator_dtype(query.dtype)), *lses])
