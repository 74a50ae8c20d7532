"""Queries and keys of a frozen graph, computed once for every text instead of once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glomo.data import pad
from glomo.nn import FrozenGraph, Graphs, TunedGraph
from glomo.nn.baselines import GraphSource

LIMIT = 512 * 2**20  # bytes; larger ones are computed anew each step, as are the graphs that cost nothing
CHUNK = 256  # texts at a time


class GraphCache:
    """``cache.batch(indices)`` is ``graph.queries_keys`` of these texts as one padded batch.

    ids: the texts, as units of the graph's vocabulary.
    """

    def __init__(self, graph: GraphSource, ids: Sequence[Sequence[int]], device: torch.device) -> None:
        self.graph, self.ids, self.device = graph, ids, device
        self._kept: list[Graphs] | None = None
        if isinstance(graph, FrozenGraph) and not isinstance(graph, TunedGraph):
            config = graph.config
            units = len(ids) * max(len(text) for text in ids)
            if units * config.layers * config.heads * config.head_dim * 4 * 4 <= LIMIT:  # two directions, query and key
                self._kept = self._compute()

    def batch(self, indices: Sequence[int]) -> tuple[Graphs, ...]:
        """The graphs of these texts, padded to the longest of them."""
        if self._kept is None:
            ids, lengths = pad([self.ids[i] for i in indices])
            return self.graph.queries_keys(ids.to(self.device), lengths.to(self.device))
        size = max(len(self.ids[i]) for i in indices)
        rows = torch.as_tensor(indices, device=self.device)
        return tuple(_select(graphs, rows, size) for graphs in self._kept)

    def _compute(self) -> list[Graphs]:
        ids, lengths = pad(self.ids)
        parts = [
            self.graph.queries_keys(ids[i : i + CHUNK].to(self.device), lengths[i : i + CHUNK].to(self.device))
            for i in range(0, len(ids), CHUNK)
        ]
        return [_join(direction) for direction in zip(*parts, strict=True)]


def _join(parts: Sequence[Graphs]) -> Graphs:
    first = parts[0]
    bias, mask = first.bias, first.attn_mask
    if _per_text(bias, first):
        bias = torch.cat([part.bias for part in parts])  # type: ignore[misc]
    if mask is not None:
        mask = torch.cat([part.attn_mask for part in parts])  # type: ignore[misc]
    query, key = torch.cat([part.query for part in parts]), torch.cat([part.key for part in parts])
    units = [part.units for part in parts if part.units is not None]
    return replace(first, query=query, key=key, bias=bias, attn_mask=mask, units=torch.cat(units) if units else None)


def _select(graphs: Graphs, rows: Tensor, size: int) -> Graphs:
    """Padding stands at the end, in both directions, so that a shorter batch is a slice."""
    bias, mask = graphs.bias, graphs.attn_mask
    if isinstance(bias, Tensor):
        if _per_text(bias, graphs):
            bias = bias[rows]
        bias = bias[..., : min(size, bias.shape[-2]), : min(size, bias.shape[-1])]
    if mask is not None:
        mask = mask[rows][..., :size]
    query, key = graphs.query[rows][..., :size, :], graphs.key[rows][..., :size, :]
    units = None if graphs.units is None else graphs.units[rows][:, :size]
    return replace(graphs, query=query, key=key, bias=bias, attn_mask=mask, units=units)


def _per_text(bias: Tensor | float, graphs: Graphs) -> bool:
    return isinstance(bias, Tensor) and bias.dim() == 4 and bias.shape[0] == graphs.query.shape[0]
