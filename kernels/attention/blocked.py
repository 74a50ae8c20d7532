"""attention over blocks of targets: besides inputs, outputs and gradients no tensor larger than a tile is alive.

Forward: P = exp(s - lse), out = P V. Backward, from the recomputed P:
    dV = P^T dout,   ds = P (dP - delta + dlse),   dP = dout V^T,   delta = <P, dP>
with dropout on P in the two products and on dP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import bias_and_mask
from ..blocked_scores import Dropout, ScoreGradients, Scores, gradient_like
from ..tiles import add_to, pad_lead, store, take_flat
from ..varlen import backward_sequences, forward_sequences

MINUS_INFINITY = float("-inf")


def masked_scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, diagonal: int | None, scale: float, lead: torch.Size
) -> Scores:
    return Scores(query, key, *bias_and_mask(attn_mask), diagonal, scale, lead, fill=MINUS_INFINITY)


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
    (dout, dlse), lse = grad_outputs, outputs[1]
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
            # The rounding of a large lse is a factor on the whole row, which would not cancel in dP - delta.
            weights.div_(weights.sum(-1, keepdim=True).masked_fill_(empty, 1))
            dout_tile = take_flat(dout, tile, tile.rows, scores.dtype)
            if scores_need_gradient:
                dweights = dropout.apply_(torch.bmm(dout_tile, values_t[..., tile.sources]), tile)
                # delta = <out, dout>, summed over the sources instead: the rounded out would miss it in half precision
                delta = (weights * dweights).sum(-1, keepdim=True)
                shift = dlse[tile.at_rows].reshape(flat).masked_fill(empty, 0) - delta
                gradients.add(tile, q, keys, dweights.add_(shift).mul_(weights))
            if dvalue is not None:
                dropped = dropout.apply_(weights, tile)
                add_to(dvalue, tile, (tile.sources, slice(None)), torch.bmm(dropped.mT, dout_tile))
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

    def run(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
        return attention_forward(q, k, v, None, seed, dropout_p, diagonal, scale, first)

    return forward_sequences(run, query, key, value, cu_seqlens_q, cu_seqlens_k, None)


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

    def run(
        grads: list[Tensor], outs: list[Tensor], q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, first: int
    ) -> list[Tensor]:
        arguments = (q, k, v, None, seed, dropout_p, diagonal, scale, first)
        return attention_backward(grads, outs, *arguments, needs=[*needs, False])

    return backward_sequences(
        run, grad_outputs, outputs, query, key, value, cu_seqlens_q, cu_seqlens_k, None, [*needs, False]
    )[:3]
