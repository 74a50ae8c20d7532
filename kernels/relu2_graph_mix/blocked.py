"""relu2_graph_mix over blocks of targets: the mixture of graph_mix, with graphs that are computed tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocked_scores import ScoreGradients, Scores, denominator, gradient_like
from ..graph_mix.blocked import Mixture, MixtureGradients, mix_forward
from ..tiles import Tile


class Relu2Graphs:
    """The graphs of relu2_affinity, recomputed whenever a tile is read."""

    def __init__(self, scores: Scores, eps: float, gradients: ScoreGradients | None = None) -> None:
        self.scores, self.eps, self.gradients = scores, eps, gradients
        self.lead, self.num_graphs = scores.lead[:-1], scores.lead[-1]
        self.num_targets, self.num_sources = scores.query.size(-2), scores.key.size(-2)
        self.diagonal, self.dtype = scores.diagonal, scores.dtype

    def read(self, tile: Tile) -> Tensor:
        self.queries, self.keys = self.scores.queries(tile), self.scores.keys(tile)
        self.r = self.scores.masked(tile, self.queries, self.keys).relu_()
        squares = self.r.square() if self.gradients is not None else self.r.square_()
        self.below = denominator(squares.sum(-1, keepdim=True), self.eps)
        self.graph = squares.div_(self.below).unflatten(0, (-1, tile.lead_shape[-1]))
        return self.graph

    def add_gradient(self, tile: Tile, dgraph: Tensor) -> None:
        """ds = 2 r (dA - <A, dA>) / (Z + eps)."""
        if self.gradients is not None:
            delta = (self.graph * dgraph).sum(-1, keepdim=True)
            dscores = (dgraph - delta).mul_(2).flatten(0, 1).mul_(self.r).div_(self.below)
            self.gradients.add(tile, self.queries, self.keys, dscores)


def _scores(
    query: Tensor,
    key: Tensor,
    features: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    diagonal: int | None,
    scale: float,
) -> Scores:
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], features.shape[:-2])
    return Scores(query, key, bias, attn_mask, diagonal, scale, torch.Size((*lead, query.size(-3))))


def relu2_graph_mix_forward(
    query: Tensor,
    key: Tensor,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> Tensor:
    graphs = Relu2Graphs(_scores(query, key, features, bias, attn_mask, diagonal, scale), eps)
    return mix_forward(Mixture(graphs, features, weights, chain_weights, num_heads), features.dtype)


def relu2_graph_mix_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
    diagonal: int | None,
    scale: float,
    eps: float,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, features, weights, chain_weights and bias."""
    scores = _scores(query, key, features, bias, attn_mask, diagonal, scale)
    score_needs = [needs[0], needs[1], needs[5]]
    gradients = ScoreGradients(scores, score_needs)
    mixture = Mixture(Relu2Graphs(scores, eps, gradients), features, weights, chain_weights, num_heads)
    mixed = MixtureGradients(mixture, grad_outputs[0], (any(score_needs), *needs[2:5]))
    dquery, dkey, dbias = gradients.results(query, key, bias)
    rest = zip((features, weights, chain_weights), (mixed.dfeatures, mixed.dweights, mixed.dchain), strict=True)
    return [dquery, dkey, *(gradient_like(t, gradient, query) for t, gradient in rest), dbias]
