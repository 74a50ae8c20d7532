"""What a labelled task is to `glomo transfer`: examples, and for each graph and seed a model, its loss and its test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.data import AnyVocabulary, Vocabulary, pad
from glomo.errors import UserError
from glomo.nn.baselines import GraphSource
from glomo.training.graph_cache import GraphCache
from glomo.training.texts import sample
from glomo.training.transfer_config import TransferConfig

STATISTICS_TEXTS = 64  # zeros and dead rows are counted on so many test texts
TEST_BATCH = 256  # most test examples at a time

Example = TypeVar("Example")


@dataclass(frozen=True)
class Setting:
    """What a trial is of."""

    config: TransferConfig
    graph: GraphSource
    chosen: Sequence[int]
    """the training examples drawn with the seed"""
    seed: int
    device: torch.device


class Trial(Protocol):
    """One graph and one seed on a task."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def patterns(self) -> Mapping[str, str]:
        """The model's layer groups, from the bottom to the top."""

    @property
    def lengths(self) -> Sequence[int]:
        """Units of each training example."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What the model cannot see of the task."""

    def loss(self, indices: Sequence[int]) -> tuple[Tensor, int, int]:
        """(mean loss, examples, units) of these training examples."""

    def test(self) -> dict[str, float]:
        """The figures of the task, each from 0 to 1."""


class Target(Protocol):
    """A task, in units of the graph's vocabulary."""

    @property
    def measures(self) -> Sequence[str]:
        """The names of a trial's figures, the one that graphs are compared by first."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many examples there are, and how many were left out or changed, and why."""

    @property
    def test_ids(self) -> Sequence[Sequence[int]]:
        """Units of the rows that graphs are made of, of the test examples."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """What a checkpoint says of the task."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int:
        """How many training examples."""

    def check(self, chosen: Sequence[int], seed: int) -> None:
        """Raise UserError unless these training examples are enough to train on."""

    def trial(self, setting: Setting) -> Trial: ...


class LabelTrial:
    """What trials of one label an example have in common: the cross-entropy, and the share of right answers."""

    model: nn.Module
    patterns: Mapping[str, str]
    counts: Mapping[str, int]
    device: torch.device
    labels: tuple[Sequence[int], Sequence[int]]
    """of the training examples, and of the test examples"""
    sizes: tuple[Sequence[int], Sequence[int]]
    """their units"""
    test_batch = TEST_BATCH

    def scores(self, test: bool, indices: Sequence[int]) -> Tensor:
        """`(B, classes)`, of training or of test examples."""
        raise NotImplementedError

    @property
    def lengths(self) -> Sequence[int]:
        return self.sizes[0]

    def loss(self, indices: Sequence[int]) -> tuple[Tensor, int, int]:
        labels = torch.tensor([self.labels[0][i] for i in indices], device=self.device)
        loss = F.cross_entropy(self.scores(False, indices), labels)
        return loss, len(indices), sum(self.lengths[i] for i in indices)

    @torch.no_grad()
    def test(self) -> dict[str, float]:
        self.model.eval()
        labels, sizes = self.labels[1], self.sizes[1]
        order = sorted(range(len(labels)), key=sizes.__getitem__)
        right = 0
        for start in range(0, len(order), self.test_batch):
            part = order[start : start + self.test_batch]
            found = self.scores(True, part).argmax(-1).tolist()
            right += sum(labels[i] == label for i, label in zip(part, found, strict=True))
        return {"accuracy": right / len(order)}


def mixing(config: TransferConfig) -> dict[str, Any]:
    """The arguments of `GraphTransfer` that the [graph] section has."""
    graph = config.graph
    return {
        "num_mixtures": graph.mixtures,
        "weights": graph.weights,
        "chains": graph.chains,
        "layers": graph.layers,
        "fusion": graph.fusion,
    }


def units_of(vocabulary: AnyVocabulary, text: str, length: int) -> tuple[list[int], list[str]]:
    """(ids for the graph, words for the features) of a text, at most `length` (0: all); a text of which nothing is
    left, were there one, would have no unit to pool: it is one unknown word."""
    size = length or None
    return vocabulary.encode(text)[:size] or [vocabulary.unk_id], vocabulary.tokens(text)[:size] or [""]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    tokens, lengths = pad(rows)
    return tokens.to(device), lengths.to(device)


def divided(examples: Sequence[Example], groups: Sequence[str], share: int = 10) -> tuple[list[Example], list[Example]]:
    """(the rest, about one `share`-th) by a hash of each example's group, so that groups stay whole."""
    held = [hashlib.sha256(group.encode("utf-8", "surrogatepass")).digest()[0] % share == 0 for group in groups]
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example, is_held in zip(examples, held, strict=True):
        parts[is_held].append(example)
    if not all(parts):
        raise UserError(
            f"data.judge is valid, and a tenth of the {len(examples)} training examples, taken by a hash, leaves "
            f"{len(parts[0])} to train on and {len(parts[1])} to judge by; more are needed"
        )
    return parts


def check_head(config: TransferConfig, *kinds: str) -> None:
    """Raise UserError for a head that a task does not know."""
    if config.head.kind not in kinds:
        raise UserError(f"head.kind is {config.head.kind}; for this task it can be {' or '.join(kinds)}")


def check_features(config: TransferConfig, vocabulary: AnyVocabulary) -> None:
    """Raise UserError for features of words where the units are none."""
    if config.features.kind == "contextual" and not isinstance(vocabulary, Vocabulary):
        raise UserError("features.kind contextual is of words, and the units of the graph are none")


def sampled(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of the examples (0: all), always the same ones, in their order."""
    return [examples[i] for i in sample(len(examples), count, 0)]


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


class PairRows:
    """The rows that a graph is made of, for examples of two texts, and their graphs: one row [first ; second] if
    `joined`, else two."""

    def __init__(self, joined: bool, first: Sequence[list[int]], second: Sequence[list[int]]) -> None:
        self.rows: list[Sequence[list[int]]] = [first, second]
        if joined:
            self.rows = [[x + y for x, y in zip(first, second, strict=True)]]

    def cached(self, graph: GraphSource, device: torch.device) -> list[GraphCache]:
        return [GraphCache(graph, rows, device) for rows in self.rows]


def statistics(
    graph: GraphSource, ids: Sequence[Sequence[int]], device: torch.device
) -> tuple[float | None, float | None]:
    """Shares of zero weights and of dead rows in the graph over some texts; None for no graph."""
    tokens, lengths = padded(ids[:STATISTICS_TEXTS], device)
    found = [graphs.statistics(lengths) for graphs in graph.queries_keys(tokens, lengths)]
    if not found:
        return None, None
    pairs, rows = sum(part.pairs for part in found), sum(part.rows for part in found)
    return (
        sum(part.zero_pairs for part in found) / max(pairs, 1),
        sum(part.dead_rows for part in found) / max(rows, 1),
    )
