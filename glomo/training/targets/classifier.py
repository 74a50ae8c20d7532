"""Small text classifiers whose features pass through a transferred graph: of one text, and of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn import Graphs, GraphTransfer
from glomo.nn.baselines import GraphSource
from glomo.training.targets.contextual import ContextFeatures
from glomo.training.targets.layers import BiRNN, PairTransfer, padding
from glomo.training.targets.words import WordFeatures


class _Classifier(nn.Module):
    def __init__(
        self, features: WordFeatures | ContextFeatures, width: int, states: bool, head: str, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.features = features
        self.states = BiRNN(features.dim, features.dim) if states else None
        self.head: nn.Module
        if head == "bigru":
            self.head = BiRNN(width, hidden)
        elif head == "conv":
            self.head = ConvHead(width, hidden)
        else:
            self.head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU())
        self.dropout = nn.Dropout(dropout)

    def layer_patterns(self) -> dict[str, str]:
        """The layer groups, from the bottom to the top."""
        patterns = {"embedding": "features", "states": "states", "graph": "transfer", "head": "head|out"}
        return {name: pattern for name, pattern in patterns.items() if self._has(pattern)}

    def _has(self, pattern: str) -> bool:
        return any(name.split(".")[0] in pattern.split("|") for name, _ in self.named_parameters())

    def _embed(self, units: Tensor, lengths: Tensor) -> Tensor:
        features = self.dropout(self.features(units))
        return features if self.states is None else self.states(features, lengths)

    def _pool(self, mixed: Tensor, lengths: Tensor) -> Tensor:
        """The greatest values over a text's units, `(B, hidden)`."""
        if isinstance(self.head, ConvHead):  # images have no padding
            return self.head(mixed).amax(1)
        hidden = self.head(mixed, lengths) if isinstance(self.head, BiRNN) else self.head(mixed)
        return hidden.masked_fill(padding(lengths.to(mixed.device), mixed.shape[1])[..., None], float("-inf")).amax(1)


class ConvHead(nn.Module):
    """Square images `(B, T, width)`, row after row, to `(B, T / 4, hidden)`: convolution 3 x 3 and ReLU, the greatest
    of each 2 x 2, and once more convolution and ReLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, hidden, 3, padding=1), nn.Conv2d(hidden, hidden, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        image = x.mT.unflatten(-1, (side, side))
        return self.second(F.max_pool2d(self.first(image).relu(), 2)).relu().flatten(2).mT


class TextClassifier(_Classifier):
    """Features H of the units, the graph applied to them, a head, and scores of the classes.

    states: H is the states of a BiGRU over the features, of the same width (GLoMo on RNN states), or the features.
    head: `"pooling"`, the maximum over the units of ReLU(linear); `"bigru"`, the maximum over BiGRU states; `"conv"`,
        of square images, the maximum over `ConvHead`.
    mixing: arguments for `GraphTransfer`.
    """

    def __init__(
        self,
        features: WordFeatures | ContextFeatures,
        graph: GraphSource,
        num_classes: int,
        states: bool = False,
        head: str = "pooling",
        hidden: int = 64,
        dropout: float = 0.0,
        **mixing: Any,
    ) -> None:
        transfer = GraphTransfer(graph, features.dim, **mixing)
        super().__init__(features, transfer.out_dim, states, head, hidden, dropout)
        self.transfer = transfer
        self.out = nn.Linear(hidden, num_classes)

    def forward(self, units: Tensor, lengths: Tensor, graph_inputs: Sequence[Graphs]) -> Tensor:
        """`units (B, T)` of the table, `lengths (B,)` at least 1, what `graph.queries_keys` gave: `(B, classes)`."""
        mixed = self.transfer(self._embed(units, lengths), lengths, graph_inputs)
        return self.out(self.dropout(self._pool(mixed, lengths)))


class PairClassifier(_Classifier):
    """Two texts to scores of the classes, by one encoder for both:

    .. code-block:: text

        scores = W relu(V [u ; v ; |u - v| ; u * v]),    u, v the pooled texts

    The encoder and its arguments are those of `TextClassifier`; `joined` says whether the graph is over both texts as
    one row (`PairTransfer`), which is then all that the encoding of one text can know of the other.

    Source: Conneau et al., EMNLP 2017 (InferSent), section 3.1.
    """

    def __init__(
        self,
        features: WordFeatures | ContextFeatures,
        graph: GraphSource,
        num_classes: int,
        joined: bool = True,
        states: bool = False,
        head: str = "pooling",
        hidden: int = 64,
        dropout: float = 0.0,
        **mixing: Any,
    ) -> None:
        transfer = PairTransfer(graph, features.dim, joined, **mixing)
        super().__init__(features, transfer.out_dim, states, head, hidden, dropout)
        self.transfer = transfer
        self.out = nn.Sequential(nn.Linear(4 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(
        self,
        first: tuple[Tensor, Tensor],
        second: tuple[Tensor, Tensor],
        graph_inputs: Sequence[Sequence[Graphs]],
    ) -> Tensor:
        """Each text is (rows of the table `(B, T)`, lengths `(B,)` of at least 1); `graph_inputs` as in
        `PairTransfer`."""
        texts = [(self._embed(units, lengths), lengths) for units, lengths in (first, second)]
        mixed = self.transfer(*texts, graph_inputs)
        u, v = (self._pool(x, lengths) for x, (_, lengths) in zip(mixed, texts, strict=True))
        return self.out(self.dropout(torch.cat([u, v, (u - v).abs(), u * v], -1)))
