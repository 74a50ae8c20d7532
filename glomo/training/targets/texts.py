"""Labelled texts as a target task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.data import AnyVocabulary, encode_labels, label_names
from glomo.errors import UserError
from glomo.nn.baselines import GraphSource
from glomo.training.graph_cache import GraphCache
from glomo.training.targets.classifier import TextClassifier
from glomo.training.targets.target import (
    TEST_BATCH,
    check_head,
    divided,
    fingerprint,
    mixing,
    padded,
    sampled,
    units_of,
)
from glomo.training.targets.words import WordFeatures, word_table
from glomo.training.texts import Labelled, labelled
from glomo.training.transfer_config import TransferConfig


@dataclass(frozen=True)
class Examples:
    """Texts as the units of the graph's vocabulary: ids for the graph, words for the features."""

    ids: list[list[int]]
    words: list[list[str]]
    labels: list[int]

    @classmethod
    def of(cls, examples: Labelled, vocabulary: AnyVocabulary, classes: Sequence[str], length: int) -> Examples:
        """Raises UserError for an unknown label."""
        labels = encode_labels([label for _, label in examples], classes)
        units = [units_of(vocabulary, text, length) for text, _ in examples]
        return cls([ids for ids, _ in units], [words for _, words in units], labels)


def check_classes(labels: Sequence[int], classes: Sequence[str], wanted: int, seed: int) -> None:
    """Raise UserError unless the labels that were drawn are of two classes at least."""
    if len(set(labels)) < 2:
        raise UserError(
            f"data.labels is {wanted}; the examples drawn with the seed {seed} are all of the class "
            f"{classes[labels[0]]!r}, and more are needed"
        )


class TextTarget:
    """The `Target` of labelled texts."""

    measures = ("accuracy",)

    def __init__(self, config: TransferConfig, vocabulary: AnyVocabulary) -> None:
        check_head(config, "pooling", "bigru")
        train, test = labelled(config.data)
        if config.data.judge == "valid":
            train, test = divided(train, [text for text, _ in train])
        test = sampled(test, config.data.judged)
        self.classes = label_names(train)
        self.train, self.test = (
            Examples.of(part, vocabulary, self.classes, config.data.length) for part in (train, test)
        )
        self.test_ids = self.test.ids
        self.counts = {"training": len(train), "test": len(test)}
        self.meta: dict[str, Any] = {"kind": "classifier", "classes": self.classes}
        self.fingerprint = fingerprint(self.train, self.test)

    def __len__(self) -> int:
        return len(self.train.labels)

    def check(self, chosen: Sequence[int], seed: int) -> None:
        check_classes([self.train.labels[i] for i in chosen], self.classes, len(chosen), seed)

    def trial(
        self, config: TransferConfig, graph: GraphSource, chosen: Sequence[int], seed: int, device: torch.device
    ) -> TextTrial:
        return TextTrial(self, config, graph, chosen, seed, device)


class TextTrial:
    def __init__(
        self,
        target: TextTarget,
        config: TransferConfig,
        graph: GraphSource,
        chosen: Sequence[int],
        seed: int,
        device: torch.device,
    ) -> None:
        train, test, features, head = target.train, target.test, config.features, config.head
        words = [train.words[i] for i in chosen]
        table = word_table(
            features, (w for text in words for w in text), (w for text in test.words for w in text), seed
        )
        self.device, self.graph, self.examples = device, graph, test
        self.rows, self.test_rows = ([table.encode(text) for text in texts] for texts in (words, test.words))
        self.labels = [train.labels[i] for i in chosen]
        self.lengths = [len(text) for text in words]
        self.cache = GraphCache(graph, [train.ids[i] for i in chosen], device)
        torch.manual_seed(seed)
        self.model = TextClassifier(
            WordFeatures(table, features.kind == "learned", features.chars),
            graph,
            len(target.classes),
            features.states,
            head.kind,
            head.hidden,
            head.dropout,
            **mixing(config),
        )
        self.patterns, self.counts = self.model.layer_patterns(), table.counts

    def loss(self, indices: Sequence[int]) -> tuple[Tensor, int, int]:
        units, lengths = padded([self.rows[i] for i in indices], self.device)
        labels = torch.tensor([self.labels[i] for i in indices], device=self.device)
        scores = self.model(units, lengths, self.cache.batch(indices))
        return F.cross_entropy(scores, labels), len(indices), int(lengths.sum())

    @torch.no_grad()
    def test(self) -> dict[str, float]:
        self.model.eval()
        order = sorted(range(len(self.test_rows)), key=lambda i: len(self.test_rows[i]))
        right = 0
        for start in range(0, len(order), TEST_BATCH):
            part = order[start : start + TEST_BATCH]
            units, lengths = padded([self.test_rows[i] for i in part], self.device)
            ids, _ = padded([self.examples.ids[i] for i in part], self.device)
            found = self.model(units, lengths, self.graph.queries_keys(ids, lengths)).argmax(-1).tolist()
            right += sum(self.examples.labels[i] == label for i, label in zip(part, found, strict=True))
        return {"accuracy": right / len(order)}
