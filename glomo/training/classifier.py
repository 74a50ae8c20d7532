"""A small text classifier whose features pass through a transferred graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glomo.nn import Graphs, GraphTransfer, reverse
from glomo.nn.baselines import GraphSource


class BiGRU(nn.Module):
    """A GRU in each direction, the second over sequences reversed by true length: `(B, T, d)` to `(B, T, out)`."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.grus = nn.ModuleList(
            nn.GRU(dim, size, batch_first=True) for size in (out_dim - out_dim // 2, out_dim // 2)
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        forward, backward = self.grus
        return torch.cat([forward(x)[0], reverse(backward(reverse(x, lengths))[0], lengths)], -1)


class TextClassifier(nn.Module):
    """Features H of the units, the graph applied to them, a head, and scores of the classes.

    vectors: `(V, dim)`, the start of the table of features; row 0 is padding, row 1 unknown units.
    train_vectors: whether the table learns.
    states: H is the states of a BiGRU over the table's rows, of the same width (GLoMo on RNN states), or the rows.
    head: `"pooling"`, the maximum over the units of ReLU(linear); `"bigru"`, the maximum over BiGRU states.
    mixing: arguments for `GraphTransfer`.
    """

    def __init__(
        self,
        vectors: Tensor,
        train_vectors: bool,
        graph: GraphSource,
        num_classes: int,
        states: bool = False,
        head: str = "pooling",
        hidden: int = 64,
        dropout: float = 0.0,
        **mixing: Any,
    ) -> None:
        super().__init__()
        dim = vectors.shape[1]
        self.embedding = nn.Embedding.from_pretrained(vectors.clone(), freeze=not train_vectors, padding_idx=0)
        self.states = BiGRU(dim, dim) if states else None
        self.transfer = GraphTransfer(graph, dim, **mixing)
        width = self.transfer.out_dim
        self.head = BiGRU(width, hidden) if head == "bigru" else nn.Sequential(nn.Linear(width, hidden), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, num_classes)

    def layer_patterns(self) -> dict[str, str]:
        """The layer groups, from the bottom to the top."""
        patterns = {"embedding": "embedding", "states": "states", "graph": "transfer", "head": "head|out"}
        of = {"states": self.states, "graph": self.transfer}
        absent = [name for name, module in of.items() if module is None or not any(True for _ in module.parameters())]
        return {name: pattern for name, pattern in patterns.items() if name not in absent}

    def forward(self, units: Tensor, lengths: Tensor, graph_inputs: Sequence[Graphs]) -> Tensor:
        """`units (B, T)` of the table, `lengths (B,)` at least 1, what `graph.queries_keys` gave: `(B, classes)`."""
        features = self.dropout(self.embedding(units))
        if self.states is not None:
            features = self.states(features, lengths)
        mixed = self.transfer(features, lengths, graph_inputs)
        hidden = self.head(mixed, lengths) if isinstance(self.head, BiGRU) else self.head(mixed)
        padding = torch.arange(units.shape[1], device=units.device) >= lengths.to(units.device)[:, None]
        pooled = hidden.masked_fill(padding[..., None], float("-inf")).amax(1)
        return self.out(self.dropout(pooled))
