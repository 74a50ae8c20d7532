"""relu2_affinity over blocks of targets: besides inputs, outputs and gradients nothing larger than a tile is alive."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocked_scores import ScoreGradients, Scores, denominator
from ..tiles import store


def relu2_affinity_forward(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    scores = Scores(query, key, bias, attn_mask, diagonal, scale, lead)
    affinity = query.new_zeros(*lead, query.size(-2), key.size(-2))
    normalizer = torch.zeros(*lead, query.size(-2), dtype=scores.dtype, device=query.device)
    for group in scores.tiles():
        keys = scores.keys(group[0])
        for tile in group:
            squares = scores.masked(tile, scores.queries(tile), keys).relu_().square_()
            z = squares.sum(-1)
            store(normalizer, tile, z)
            target = affinity[tile.at_rows][..., tile.sources]
            target.copy_(squares.div_(denominator(z, eps)[..., None]).view(target.shape))
    return affinity, normalizer


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
    """ds = 2 r [(dA - <A, dA>) / (Z + eps) + dZ]."""
    (daffinity, dnormalizer), normalizer = grad_outputs, outputs[1]
    scores = Scores(query, key, bias, attn_mask, diagonal, scale, normalizer.shape[:-1])
    gradients = ScoreGradients(scores, needs)
    for group in scores.tiles():
        keys = scores.keys(group[0])
        for tile in group:
            q = scores.queries(tile)
            r = scores.masked(tile, q, keys).relu_()
            flat = (*r.shape[:-1], 1)
            below = denominator(normalizer[tile.at_rows], eps).reshape(flat)
            da = daffinity[tile.at_rows][..., tile.sources].reshape(r.shape).to(scores.dtype) * 2
            delta = (r.square().div_(below) * da).sum(-1, keepdim=True)
            shift = below * dnormalizer[tile.at_rows].reshape(flat) * 2 - delta
            gradients.add(tile, q, keys, da.add_(shift).mul_(r).div_(below))
    return gradients.results(query, key, bias)
