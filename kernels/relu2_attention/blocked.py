"""relu2_attention over blocks of targets: besides inputs, outputs and gradients no tensor larger than a tile is alive.

Forward: A = r² / (Z + eps), out = A V. Backward, from the recomputed r:
    dV = (A dropped)^T dout,   ds = 2 r [(dP - delta) / (Z + eps) + dZ],   dP = dout V^T dropped,   delta = <A, dP>
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocked_scores import Dropout, ScoreGradients, Scores, denominator, gradient_like
from ..tiles import add_to, pad_lead, store, take_flat
from ..varlen import backward_sequences, forward_sequences


def relu2_attention_forward(
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
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    scores = Scores(query, key, bias, attn_mask, diagonal, scale, lead)
    value = pad_lead(value, len(lead))
    dropout = Dropout(seed, dropout_p, lead, first_batch_head)
    out = query.new_zeros(*lead, query.size(-2), value.size(-1))
    normalizer = torch.zeros(*lead, query.size(-2), dtype=scores.dtype, device=query.device)
    for group in scores.tiles():
        keys = scores.keys(group[0])
        values = take_flat(value, group[0], slice(None), scores.dtype)
        for tile in group:
            squares = scores.masked(tile, scores.queries(tile), keys).relu_().square_()
            z = squares.sum(-1)
            store(normalizer, tile, z)
            weights = squares.div_(denominator(z, eps)[..., None])  # before the product, which could overflow
            store(out, tile, torch.bmm(dropout.apply_(weights, tile), values[:, tile.sources]))
    return out, normalizer


def relu2_attention_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
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
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and bias."""
    (dout, dnormalizer), normalizer = grad_outputs, outputs[1]
    lead = normalizer.shape[:-1]
    scores = Scores(query, key, bias, attn_mask, diagonal, scale, lead)
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
            r = scores.masked(tile, q, keys).relu_()
            flat = (*r.shape[:-1], 1)
            below = denominator(normalizer[tile.at_rows], eps).reshape(flat)
            dout_tile = take_flat(dout, tile, tile.rows, scores.dtype)
            weights = r.square().div_(below)
            if scores_need_gradient:
                dweights = dropout.apply_(torch.bmm(dout_tile * 2, values_t[..., tile.sources]), tile)
                # delta = <out, dout>, summed over the sources instead: with the rounded out a row of one source,
                # where dP and delta are equal, would leave a rounding times 1 / Z.
                delta = (weights * dweights).sum(-1, keepdim=True)
                shift = dnormalizer[tile.at_rows].reshape(flat) * below * 2 - delta
                gradients.add(tile, q, keys, dweights.add_(shift).mul_(r).div_(below))
            if dvalue is not None:
                dropped = dropout.apply_(weights, tile)
                add_to(dvalue, tile, (tile.sources, slice(None)), torch.bmm(dropped.mT, dout_tile))
    dquery, dkey, dbias = gradients.results(query, key, bias)
    return [dquery, dkey, gradient_like(value, dvalue), dbias]


def relu2_attention_varlen_forward(
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

    def run(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
        return relu2_attention_forward(q, k, v, b, None, seed, dropout_p, diagonal, scale, eps, first)

    return forward_sequences(run, query, key, value, cu_seqlens_q, cu_seqlens_k, bias)


def relu2_attention_varlen_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
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
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and bias."""

    def run(
        grads: list[Tensor], outs: list[Tensor], q: Tensor, k: Tensor, v: Tensor, b: Tensor | None, first: int
    ) -> list[Tensor]:
        arguments = (q, k, v, b, None, seed, dropout_p, diagonal, scale, eps, first)
        return relu2_attention_backward(grads, outs, *arguments, needs=needs)

    return backward_sequences(run, grad_outputs, outputs, query, key, value, cu_seqlens_q, cu_seqlens_k, bias, needs)
