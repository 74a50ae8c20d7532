"""Labelled texts as a target task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glomo.data import AnyVocabulary, encode_labels, label_names
from glomo.errors import UserError
from glomo.training.graph_cache import GraphCache
from glomo.training.targets.classifier import TextClassifier
from glomo.training.targets.target import (
    LabelTrial,
    Setting,
    check_features,
    check_head,
    divided,
    fingerprint,
    mixing,
    padded,
    sampled,
    units_of,
)
from glomo.training.targets.words import feature_table
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
        check_features(config, vocabulary)
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

    def trial(self, setting: Setting) -> TextTrial:
        return TextTrial(self, setting)


class TextTrial(LabelTrial):
    def __init__(self, target: TextTarget, setting: Setting) -> None:
        features, head, chosen = setting.config.features, setting.config.head, setting.chosen
        train, test = target.train, target.test
        words = [train.words[i] for i in chosen], test.words
        table = feature_table(setting, *words)
        self.device = setting.device
        self.labels = [train.labels[i] for i in chosen], test.labels
        self.rows = [[table.encode(text) for text in texts] for texts in words]
        self.sizes = [len(row) for row in self.rows[0]], [len(row) for row in self.rows[1]]
        ids = [train.ids[i] for i in chosen], test.ids
        self.graphs = [GraphCache(setting.graph, texts, self.device) for texts in ids]
        torch.manual_seed(setting.seed)
        self.model = TextClassifier(
            table.features(features),
            setting.graph,
            len(target.classes),
            features.states,
            head.kind,
            head.hidden,
            head.dropout,
            **mixing(setting.config),
        )
        self.patterns, self.counts = self.model.layer_patterns(), table.counts

    def scores(self, test: bool, indices: Sequence[int]) -> Tensor:
        units, lengths = padded([self.rows[test][i] for i in indices], self.device)
        return self.model(units, lengths, self.graphs[test].batch(indices))
