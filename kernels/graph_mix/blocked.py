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
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..arguments import accumulator_dtype
from ..blocked_scores import gradient_like
from ..tiles import MAX_ROWS, TILE_ELEMENTS, Tile, add_to, pad_lead, take, take_flat, tiles


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
            together = max(1, min(n, TILE_ELEMENTS // max(graphs.num_sources * min(graphs.num_targets, MAX_ROWS), 1)))
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
            state = features.new_zeros(group[0].count, self.together, self.graphs.num_targets, features.size(-1))
            for tile in group:
                state[:, :, tile.rows] = self.graphs.read(over_graphs(tile, heads)) @ previous[:, :, tile.sources]
            states.append(state)
        return states


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


@dataclass
class Link:
    """One layer of the chains in the backward pass, (count, heads, T, E) each: X_l = A_l X_{l-1}."""

    state: Tensor  # X_l
    previous: Tensor  # X_{l-1}; the features (count, 1, S, E) below the first layer
    dstate: Tensor | None  # what the layer above adds to dX_l
    dprevious: Tensor | None  # where A_l^T dX_l goes; None below the first layer, where it goes to the features


class MixtureGradients:
    """The backward pass: sums gradients over the tiles, in the accumulator's dtype; the graphs collect theirs.

    needs says which of graphs, features, weights and chain_weights get one; dfeatures, dweights and dchain are None
    where not needed.
    """

    def __init__(self, mixture: Mixture, dout: Tensor, needs: Sequence[bool]) -> None:
        self.mixture, self.dout, self.need_graphs = mixture, dout, needs[0]
        chain_weights = mixture.chain_weights
        shape, dtype = mixture.features.shape, mixture.graphs.dtype
        self.dfeatures = torch.zeros(shape, dtype=dtype, device=dout.device) if needs[1] else None
        self.dweights = torch.zeros_like(mixture.weights) if needs[2] else None
        self.dchain = torch.zeros_like(chain_weights) if needs[3] and chain_weights is not None else None
        for group in mixture.groups():
            features = take_flat(mixture.features, group[0], slice(None), dtype)
            if chain_weights is None:
                for tile in group:
                    self._add_tile(tile, features, mixture.stages[0], None)
            else:
                self._add_chain(group, features)

    def _add_chain(self, group: list[Tile], features: Tensor) -> None:
        states, dstate = self.mixture.chain(group, features), None
        for level in reversed(range(len(states))):
            previous = states[level - 1] if level else features[:, None]
            link = Link(states[level], previous, dstate, torch.zeros_like(previous) if level else None)
            for tile in group:
                self._add_tile(tile, features, self.mixture.stages[level], link)
            dstate = link.dprevious

    def _add_tile(self, tile: Tile, features: Tensor, stage: list[slice], link: Link | None) -> None:
        mixture = self.mixture
        dout = self._dout(tile)
        dmixed = mixed = None  # dP and the mixed graph, (count, rows, M, sources)
        if self.need_graphs or self.dweights is not None:
            dmixed = torch.bmm(dout.flatten(1, 2), features[:, tile.sources].mT).view(*dout.shape[:3], -1)
        if self.dfeatures is not None:
            mixed = features.new_zeros(*dout.shape[:3], tile.sources.stop)
        for heads in stage:
            part = over_graphs(tile, heads)
            graph = mixture.graphs.read(part)
            weights = mixture.tile_weights(mixture.weights, tile, heads)
            if mixed is not None:
                mixed += weighted_sum(weights, graph)
            if dmixed is not None and self.dweights is not None:
                add_weights(self.dweights, tile, heads, torch.einsum("ctms,cnts->mctn", dmixed, graph))
            drows = None if link is None else self._add_link(tile, heads, graph, dout, link)
            if self.need_graphs and dmixed is not None:
                weights = weights.expand(-1, -1, tile.num_rows, -1)
                dgraph = torch.einsum("mctn,ctms->cnts", weights, dmixed)
                if link is not None and drows is not None:
                    dgraph = dgraph + drows @ link.previous[:, :, tile.sources].mT
                mixture.graphs.add_gradient(part, dgraph)
        if mixed is not None:
            self._add_features(tile, torch.bmm(mixed.flatten(1, 2).mT, dout.flatten(1, 2)))

    def _add_link(self, tile: Tile, heads: slice, graph: Tensor, dout: Tensor, link: Link) -> Tensor:
        """Takes dc and A^T dX of a tile of a chain's layer; returns dX (count, heads, rows, E)."""
        chain_weights = self.mixture.chain_weights
        assert chain_weights is not None
        if self.dchain is not None:
            state = link.state[:, :, tile.rows]
            add_weights(self.dchain, tile, heads, torch.einsum("ctme,cnte->mctn", dout, state))
        weights = self.mixture.tile_weights(chain_weights, tile, heads).expand(-1, -1, tile.num_rows, -1)
        drows = torch.einsum("mctn,ctme->cnte", weights, dout)
        if link.dstate is not None:
            drows = drows + link.dstate[:, :, tile.rows]
        if link.dprevious is not None:
            link.dprevious[:, :, tile.sources] += graph.mT @ drows
        elif self.dfeatures is not None:
            self._add_features(tile, (graph.mT @ drows).sum(1))
        return drows

    def _dout(self, tile: Tile) -> Tensor:
        """dout of the tile, (count, rows, M, E)."""
        index = (slice(None), *tile.at_rows)
        piece = self.dout[index].reshape(self.mixture.num_mixtures, tile.count, tile.num_rows, -1)
        return piece.permute(1, 2, 0, 3).to(self.mixture.graphs.dtype).contiguous()

    def _add_features(self, tile: Tile, piece: Tensor) -> None:
        assert self.dfeatures is not None
        add_to(self.dfeatures, tile, (tile.sources, slice(None)), piece)


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
    mixed = MixtureGradients(mixture, grad_outputs[0], needs)
    inputs = (graphs, features, weights, chain_weights)
    gradients = (given.gradient, mixed.dfeatures, mixed.dweights, mixed.dchain)
    return [gradient_like(t, gradient, features) for t, gradient in zip(inputs, gradients, strict=True)]
