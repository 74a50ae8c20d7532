"""Mixtures of graphs and of their running products, over blocks of targets, for given graphs (graph_mix) and for
graphs that are computed tile by tile (relu2_graph_mix): no T x S tensor and no product of two graphs is formed.

Forward, with X_0 = F and X_l = A_l X_{l-1} within each head:
    out_m = (sum_n w_mn A_n) F + sum_n c_mn X_n
The weighted tiles of the graphs are summed before one product with the features: with a block of whole rows every
normaliser is at hand, and the sum costs a pass over the tile where a product costs one per feature.

Backward, with dP_m = dout_m F^T and dX_l = sum_m c_ml dout_m + A_{l+1}^T dX_{l+1}:
    dA_n = sum_m w_mn dP_m + dX_n X_{n-1}^T,   dw_mn = <dP_m, A_n>,   dc_mn = <dout_m, X_n>,
    dF   = sum_mn w_mn A_n^T dout_m + A_1^T dX_1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..arguments import accumulator_dtype
from ..blocked_scores import gradient_like
from ..tiles import TILE_ELEMENTS, Tile, add_to, pad_lead, take, take_flat, tiles


class Graphs(Protocol):
    """N graphs (lead..., N, T, S) that are read tile by tile."""

    lead: torch.Size
    num_graphs: int
    num_targets: int
    num_sources: int
    diagonal: int | None
    dtype: torch.dtype

    def read(self, tile: Tile) -> Tensor:
        """A (count, n, rows, sources) of a tile whose last leading slice is over the graphs."""

    def add_gradient(self, tile: Tile, dgraph: Tensor) -> None:
        """Takes dA (count, n, rows, sources) of the tile read last."""


def over_graphs(tile: Tile, graphs: slice) -> Tile:
    """The tile with the graphs as its last leading dimension."""
    return replace(tile, lead=(*tile.lead, graphs), lead_shape=(*tile.lead_shape, graphs.stop - graphs.start))


class Mixture:
    """Shapes and slices that the forward and the backward pass share."""

    def __init__(
        self, graphs: Graphs, features: Tensor, weights: Tensor, chain_weights: Tensor | None, num_heads: int
    ) -> None:
        self.graphs, self.weights, self.chain_weights = graphs, weights, chain_weights
        self.features = pad_lead(features, len(graphs.lead))
        self.num_mixtures = weights.size(0)
        n = graphs.num_graphs
        if chain_weights is None:
            # A tile of as many graphs as fit beside each other; their weighted sum takes the product.
            together = max(1, min(n, TILE_ELEMENTS // max(graphs.num_sources * min(graphs.num_targets, 64), 1)))
            self.stages = [[slice(i, min(i + together, n)) for i in range(0, n, together)]]
        else:
            together = num_heads
            self.stages = [[slice(i, i + num_heads)] for i in range(0, n, num_heads)]
        self.together = together

    def groups(self) -> list[list[Tile]]:
        g = self.graphs
        return list(tiles(g.lead, g.num_targets, g.num_sources, g.diagonal, self.together))

    def tile_weights(self, weights: Tensor, tile: Tile, graphs: slice) -> Tensor:
        """(M, count, rows or 1, n) of canonical weights (M, lead..., T or 1, N)."""
        w = take(weights, (slice(None), *tile.lead), tile.rows, graphs)
        return w.expand(-1, *tile.lead_shape, *w.shape[-2:]).reshape(self.num_mixtures, tile.count, *w.shape[-2:])

    def chain(self, group: list[Tile], features: Tensor) -> list[Tensor]:
        """X_1 .. X_L of a group of tiles, each (count, heads, T, E)."""
        states: list[Tensor] = []
        for (heads,) in self.stages:
            previous = states[-1] if states else features[:, None]
            states.append(self.next_state(group, heads, previous))
        return states

    def next_state(self, group: list[Tile], heads: slice, previous: Tensor) -> Tensor:
        shape = (group[0].count, heads.stop - heads.start, self.graphs.num_targets, previous.size(-1))
        state = previous.new_zeros(shape)
        for tile in group:
            state[:, :, tile.rows] = self.graphs.read(over_graphs(tile, heads)) @ previous[:, :, tile.sources]
        return state


def mix_forward(mixture: Mixture, dtype: torch.dtype) -> Tensor:
    """(M, lead..., T, E) in the accumulator's dtype, cast to dtype."""
    graphs, m = mixture.graphs, mixture.num_mixtures
    out = mixture.weights.new_zeros(m, *graphs.lead, graphs.num_targets, mixture.features.size(-1), dtype=graphs.dtype)
    for group in mixture.groups():
        features = take_flat(mixture.features, group[0], slice(None), graphs.dtype)
        previous = features[:, None]
        for level, stage in enumerate(mixture.stages):
            state = None
            if mixture.chain_weights is not None and level + 1 < len(mixture.stages):
                state = previous.new_zeros(group[0].count, mixture.together, graphs.num_targets, features.size(-1))
            for tile in group:
                mixed = features.new_zeros(tile.count, tile.num_rows, m, tile.sources.stop)
                for heads in stage:
                    graph = graphs.read(over_graphs(tile, heads))
                    mixed += weighted_sum(mixture.tile_weights(mixture.weights, tile, heads), graph)
                result = torch.bmm(mixed.flatten(1, 2), features[:, tile.sources]).view(*mixed.shape[:3], -1)
                if mixture.chain_weights is not None:
                    rows = graph @ previous[:, :, tile.sources]
                    if state is not None:
                        state[:, :, tile.rows] = rows
                    result += weighted_sum(mixture.tile_weights(mixture.chain_weights, tile, heads), rows)
                index = (slice(None), *tile.at_rows)
                target = out[index]
                target.add_(result.movedim(2, 0).reshape(target.shape))
            if state is not None:
                previous = state
    return out.to(dtype)


def weighted_sum(weights: Tensor, pieces: Tensor) -> Tensor:
    """(count, rows, M, D): sum over n of weights (M, count, rows or 1, n) times pieces (count, n, rows, D)."""
    if weights.size(2) == 1:
        flat = torch.bmm(weights[:, :, 0].transpose(0, 1), pieces.flatten(2))
        return flat.view(pieces.size(0), weights.size(0), *pieces.shape[2:]).transpose(1, 2)
    return torch.einsum("mctn,cntd->ctmd", weights, pieces)


def mix_backward(mixture: Mixture, dout: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients (dfeatures, dweights, dchain_weights) in the accumulator's dtype, each None where not needed;
    the graphs collect theirs through add_gradient. needs: graphs, features, weights, chain_weights."""
    graphs, chain_weights, m = mixture.graphs, mixture.chain_weights, mixture.num_mixtures
    need_graphs, need_features, need_weights, need_chain = needs
    chained = chain_weights is not None
    dfeatures = torch.zeros(mixture.features.shape, dtype=graphs.dtype, device=dout.device)
    dweights = torch.zeros_like(mixture.weights) if need_weights else None
    dchain = torch.zeros_like(chain_weights) if need_chain and chain_weights is not None else None
    for group in mixture.groups():
        first = group[0]
        features = take_flat(mixture.features, first, slice(None), graphs.dtype)
        states = mixture.chain(group, features) if chained else []
        dstate: Tensor | None = None  # d/dX of the stage at hand, from the stage above it
        for level in reversed(range(len(mixture.stages))):
            stage = mixture.stages[level]
            previous = (states[level - 1] if level else features[:, None]) if chained else None
            dprevious = torch.zeros_like(states[0]) if chained and level else None
            for tile in group:
                # (count, rows, M, E) and its product with the features (count, rows, M, sources)
                index = (slice(None), *tile.at_rows)
                dtile = dout[index].reshape(m, tile.count, tile.num_rows, -1)
                dtile = dtile.permute(1, 2, 0, 3).to(graphs.dtype).contiguous()
                dmixed = None
                if need_graphs or need_weights:
                    dmixed = torch.bmm(dtile.flatten(1, 2), features[:, tile.sources].mT).view(*dtile.shape[:3], -1)
                mixed = features.new_zeros(tile.count, tile.num_rows, m, tile.sources.stop) if need_features else None
                for heads in stage:
                    part = over_graphs(tile, heads)
                    graph = graphs.read(part)
                    w = mixture.tile_weights(mixture.weights, tile, heads)
                    if mixed is not None:
                        mixed += weighted_sum(w, graph)
                    dgraph = None
                    if dmixed is not None:
                        if dweights is not None:
                            add_weights(dweights, tile, heads, torch.einsum("ctms,cnts->mctn", dmixed, graph))
                        if need_graphs:
                            dgraph = torch.einsum("mctn,ctms->cnts", w.expand(-1, -1, tile.num_rows, -1), dmixed)
                    if previous is not None and chain_weights is not None:
                        if dchain is not None:
                            state = states[level][:, :, tile.rows]
                            add_weights(dchain, tile, heads, torch.einsum("ctme,cnte->mctn", dtile, state))
                        c = mixture.tile_weights(chain_weights, tile, heads).expand(-1, -1, tile.num_rows, -1)
                        drows = torch.einsum("mctn,ctme->cnte", c, dtile)
                        if dstate is not None:
                            drows = drows + dstate[:, :, tile.rows]
                        if dgraph is not None:
                            dgraph = dgraph + drows @ previous[:, :, tile.sources].mT
                        back = graph.mT @ drows
                        if dprevious is not None:
                            dprevious[:, :, tile.sources] += back
                        elif need_features:
                            add_to(dfeatures, tile, (tile.sources, slice(None)), back.sum(1))
                    if dgraph is not None:
                        graphs.add_gradient(part, dgraph)
                if mixed is not None:
                    product = torch.bmm(mixed.flatten(1, 2).mT, dtile.flatten(1, 2))
                    add_to(dfeatures, tile, (tile.sources, slice(None)), product)
            dstate = dprevious
    return dfeatures if need_features else None, dweights, dchain


def add_weights(total: Tensor, tile: Tile, graphs: slice, piece: Tensor) -> None:
    """total (M, lead..., T or 1, N)[tile] += piece (M, count, rows, n), summed over what total broadcasts."""
    target = take(total, (slice(None), *tile.lead), tile.rows, graphs)
    piece = piece.reshape(piece.size(0), *tile.lead_shape, *piece.shape[2:])
    target.add_(piece.sum_to_size(target.shape))


class GivenGraphs:
    """Graphs that lie in memory."""

    def __init__(self, graphs: Tensor, lead: torch.Size, need_gradient: bool = False) -> None:
        self.tensor, self.lead = pad_lead(graphs, len(lead) + 1), lead
        self.diagonal: int | None = None
        self.num_graphs, self.num_targets, self.num_sources = graphs.shape[-3:]
        self.dtype = accumulator_dtype(graphs.dtype)
        self.gradient = (
            torch.zeros(self.tensor.shape, dtype=self.dtype, device=graphs.device) if need_gradient else None
        )

    def read(self, tile: Tile) -> Tensor:
        piece = take(self.tensor, tile.lead, tile.rows, tile.sources)
        piece = piece.expand(*tile.lead_shape, *piece.shape[-2:])
        return piece.reshape(math.prod(tile.lead_shape[:-1]), *piece.shape[-3:]).to(self.dtype)

    def add_gradient(self, tile: Tile, dgraph: Tensor) -> None:
        if self.gradient is not None:
            add_to(self.gradient, tile, (tile.rows, tile.sources), dgraph.flatten(0, 1))


def graph_mix_forward(
    graphs: Tensor, features: Tensor, weights: Tensor, chain_weights: Tensor | None, num_heads: int
) -> Tensor:
    lead = torch.broadcast_shapes(graphs.shape[:-3], features.shape[:-2])
    mixture = Mixture(GivenGraphs(graphs, lead), features, weights, chain_weights, num_heads)
    return mix_forward(mixture, features.dtype)


def graph_mix_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    graphs: Tensor,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    num_heads: int,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of graphs, features, weights and chain_weights."""
    given = GivenGraphs(graphs, outputs[0].shape[1:-2], needs[0])
    mixture = Mixture(given, features, weights, chain_weights, num_heads)
    dfeatures, dweights, dchain = mix_backward(mixture, grad_outputs[0], needs)
    inputs = (graphs, features, weights, chain_weights)
    gradients = (given.gradient, dfeatures, dweights, dchain)
    return [gradient_like(t, gradient, features) for t, gradient in zip(inputs, gradients, strict=True)]
