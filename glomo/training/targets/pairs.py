"""Labelled pairs of texts as a target task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glomo.data import AnyVocabulary, encode_labels, label_names
from glomo.data.files import read_labelled_pairs
from glomo.errors import UserError
from glomo.training.targets.classifier import PairClassifier
from glomo.training.targets.target import (
    LabelTrial,
    PairRows,
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
from glomo.training.targets.texts import check_classes
from glomo.training.targets.words import feature_table
from glomo.training.transfer_config import TransferConfig, TransferData

Pairs = list[tuple[str, str, str]]


def labelled_pairs(data: TransferData) -> tuple[Pairs, Pairs]:
    """(training, test) examples as (text, second text, label)."""
    files = (data.train, data.test)
    if any(files):
        if not all(files):
            raise UserError("a task needs two files, --data.train FILE and --data.test FILE; only one is given")
        columns = (data.text_column, data.pair_column, data.label_column)
        return read_labelled_pairs(data.train, *columns), read_labelled_pairs(data.test, *columns)
    from glomo.data.catalogue import load_labelled_pairs

    return load_labelled_pairs(data.dataset, "train"), load_labelled_pairs(data.test_dataset or data.dataset, "test")


class PairExamples:
    """Pairs as the units of the graph's vocabulary."""

    def __init__(self, pairs: Pairs, vocabulary: AnyVocabulary, classes: Sequence[str], length: int) -> None:
        self.labels = encode_labels([label for *_, label in pairs], classes)
        units = [[units_of(vocabulary, text, length) for text in texts] for *texts, _ in pairs]
        self.ids = [[pair[side][0] for pair in units] for side in (0, 1)]
        self.words = [[pair[side][1] for pair in units] for side in (0, 1)]

    def __len__(self) -> int:
        return len(self.labels)


class PairTarget:
    """The `Target` of labelled pairs."""

    measures = ("accuracy",)

    def __init__(self, config: TransferConfig, vocabulary: AnyVocabulary) -> None:
        check_head(config, "pooling", "bigru")
        check_features(config, vocabulary)
        train, test = labelled_pairs(config.data)
        if config.data.judge == "valid":
            train, test = divided(train, [first for first, *_ in train])  # all pairs of a text on one side
        test = sampled(test, config.data.judged)
        self.classes = label_names([(text, label) for text, _, label in train])
        self.train, self.test = (
            PairExamples(part, vocabulary, self.classes, config.data.length) for part in (train, test)
        )
        self.test_ids = PairRows(config.graph.joined, *self.test.ids).rows[0]
        self.counts = {"training": len(train), "test": len(test)}
        self.meta: dict[str, Any] = {"kind": "pair-classifier", "classes": self.classes}
        self.fingerprint = fingerprint(*((part.ids, part.words, part.labels) for part in (self.train, self.test)))

    def __len__(self) -> int:
        return len(self.train)

    def check(self, chosen: Sequence[int], seed: int) -> None:
        check_classes([self.train.labels[i] for i in chosen], self.classes, len(chosen), seed)

    def trial(self, setting: Setting) -> PairTrial:
        return PairTrial(self, setting)


class PairTrial(LabelTrial):
    def __init__(self, target: PairTarget, setting: Setting) -> None:
        features, head, joined = setting.config.features, setting.config.head, setting.config.graph.joined
        train, test = target.train, target.test
        words = [[side[i] for i in setting.chosen] for side in train.words], test.words
        texts = [[text for side in part for text in side] for part in words]
        table = feature_table(setting, texts[0], texts[1])
        self.device = setting.device
        self.labels = [train.labels[i] for i in setting.chosen], test.labels
        self.rows = [[[table.encode(text) for text in side] for side in part] for part in words]
        sizes = [[len(x) + len(y) for x, y in zip(*part, strict=True)] for part in self.rows]
        self.sizes = sizes[0], sizes[1]
        ids = [[side[i] for i in setting.chosen] for side in train.ids], test.ids
        self.graphs = [PairRows(joined, *part).cached(setting.graph, self.device) for part in ids]
        torch.manual_seed(setting.seed)
        self.model = PairClassifier(
            table.features(features),
            setting.graph,
            len(target.classes),
            joined,
            features.states,
            head.kind,
            head.hidden,
            head.dropout,
            **mixing(setting.config),
        )
        self.patterns, self.counts = self.model.layer_patterns(), table.counts

    def scores(self, test: bool, indices: Sequence[int]) -> Tensor:
        first, second = (padded([side[i] for i in indices], self.device) for side in self.rows[test])
        return self.model(first, second, [cache.batch(indices) for cache in self.graphs[test]])
