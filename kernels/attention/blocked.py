"""attention over blocks of targets: besides inputs, outputs and gradients no tensor larger than a tile is alive.

Forward: P = exp(s - lse), out = P V. Backward, from the recomputed P:
    dV = P^T dout,   ds = P (dP - delta + dlse),   dP = dout V^T,   delta = <out, dout>
with dropout on P in the two products and on dP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import accumulator_dtype
from ..blocked_scores import ScoreGradients, Scores, gradient_like
from ..relu2_attention.blocked import Dropout
from ..tiles import add_to, pad_lead, store, take_flat
from ..varlen import sequences

MINUS_INFINITY = float("-inf")


def masked_scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, diagonal: int | None, scale: float, lead: torch.Size
) -> Scores:
    """A bool mask says what may be read, a float mask is added to the scores."""
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    bias, mask = (None, attn_mask) if is_bool else (attn_mask, None)
    return Scores(query, key, bias, mask, diagonal, scale, lead, fill=MINUS_INFINITY)


def attention_forward(
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
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    scores = masked_scores(query, key, attn_mask, diagonal, scale, lead)
    value = pad_lead(value, len(lead))
    dropout = Dropout(seed, dropout_p, lead, first_batch_head)
    out = query.new_zeros(*lead, query.size(-2), value.size(-1))
    lse = torch.full((*lead, query.size(-2)), MINUS_INFINITY, dtype=scores.dtype, device=query.device)
    for group in scores.tiles():
        keys = scores.keys(group[0])
        values = take_flat(value, group[0], slice(None), scores.dtype)
        for tile in group:
            weights = scores.masked(tile, scores.queries(tile), keys)
            row_max = weights.amax(-1, keepdim=True)
            row_max.masked_fill_(row_max == MINUS_INFINITY, 0)
            weights.sub_(row_max).exp_()
            total = weights.sum(-1, keepdim=True)
            store(lse, tile, row_max + total.log())  # log(0) = -inf where nothing may be read
            product = torch.bmm(dropout.apply_(weights, tile), values[:, tile.sources])
            store(out, tile, product.div_(total.masked_fill_(total == 0, 1)))
    return out, lse


def attention_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    first_batch_head: int = 0,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and a float attn_mask."""
    (dout, dlse), (out, lse) = grad_outputs, outputs
    lead = lse.shape[:-1]
    scores = masked_scores(query, key, attn_mask, diagonal, scale, lead)
    dropout = Dropout(seed, dropout_p, lead, first_batch_head)
    gradients = ScoreGradients(scores, [needs[0], needs[1], needs[3]])
    values = pad_lead(value, len(lead))
    dvalue = torch.zeros(values.shape, dtype=scores.dtype, device=value.device) if needs[2] else None
    scores_need_gradient = needs[0] or needs[1] or needs[3]
    for group in scores.tiles():
        keys = scores.keys(group[0])
        values_t = take_flat(values, group[0], slice(None), scores.dtype).mT
        for tile in group:
            q = scores.queries(tile)
            weights = scores.masked(tile, q, keys)
            flat = (*weights.shape[:-1], 1)
            row_lse = lse[tile.at_rows].reshape(flat)
            empty = row_lse == MINUS_INFINITY
            weights.sub_(row_lse.masked_fill(empty, 0)).exp_()  # all 0 in an empty row
            dout_tile = take_flat(dout, tile, tile.rows, scores.dtype)
            if dvalue is not None:
                dropped = weights if seed is None else dropout.apply_(weights.clone(), tile)
                add_to(dvalue, tile, (tile.sources, slice(None)), torch.bmm(dropped.mT, dout_tile))
            if scores_need_gradient:
                delta = (take_flat(out, tile, tile.rows, scores.dtype) * dout_tile).sum(-1, keepdim=True)
                shift = dlse[tile.at_rows].reshape(flat).masked_fill(empty, 0) - delta
                dweights = dropout.apply_(torch.bmm(dout_tile, values_t[..., tile.sources]), tile)
                gradients.add(tile, q, keys, dweights.add_(shift).mul_(weights))
    dquery, dkey, dmask = gradients.results(query, key, attn_mask)
    return [dquery, dkey, gradient_like(value, dvalue), dmask]


def attention_varlen_forward(
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
    out = query.new_zeros(*query.shape[:-1], value.size(-1))
    lse = torch.full(query.shape[:-1], MINUS_INFINITY, dtype=accumulator_dtype(query.dtype), device=query.device)
    for sequence in sequences(cu_seqlens_q, cu_seqlens_k, query, key):
        q, k, v = sequence.targets(query), sequence.sources(key), sequence.sources(value)
        o, row_lse = attention_forward(q, k, v, None, seed, dropout_p, diagonal, scale, sequence.first_batch_head)
        sequence.targets(out).copy_(o)
        sequence.targets(lse[..., None]).copy_(row_lse[..., None])
    return out, lse


def attention_varlen_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    diagonal: int | None,
    scale: float,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key and value."""
    dquery, dkey, dvalue = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    (dout, dlse), (out, lse) = grad_outputs, outputs
    for sequence in sequences(cu_seqlens_q, cu_seqlens_k, query, key):
        q, k, v = sequence.targets(query), sequence.sources(key), sequence.sources(value)
        gradients = attention_backward(
            [sequence.targets(dout), sequence.targets(dlse[..., None]).squeeze(-1)],
            [sequence.targets(out), sequence.targets(lse[..., None]).squeeze(-1)],
            *(q, k, v, None, seed, dropout_p, diagonal, scale, sequence.first_batch_head),
            needs=[*needs, False],
        )
        totals = (sequence.targets(dquery), sequence.sources(dkey), sequence.sources(dvalue))
        for need, total, gradient in zip(needs, totals, gradients, strict=False):
            if need:
                total.copy_(gradient)
    return [
        gradient_like(t, total if need else None, query)
        for t, total, need in zip((query, key, value), (dquery, dkey, dvalue), needs, strict=True)
    ]
