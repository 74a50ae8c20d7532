"""Labelled pairs of texts as a target task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.data import AnyVocabulary, encode_labels, label_names
from glomo.data.files import read_labelled_pairs
from glomo.errors import UserError
from glomo.nn.baselines import GraphSource
from glomo.training.targets.classifier import PairClassifier
from glomo.training.targets.target import (
    TEST_BATCH,
    PairRows,
    check_head,
    divided,
    fingerprint,
    mixing,
    padded,
    sampled,
    units_of,
)
from glomo.training.targets.texts import check_classes
from glomo.training.targets.words import WordFeatures, word_table
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

    def trial(
        self, config: TransferConfig, graph: GraphSource, chosen: Sequence[int], seed: int, device: torch.device
    ) -> PairTrial:
        return PairTrial(self, config, graph, chosen, seed, device)


class PairTrial:
    def __init__(
        self,
        target: PairTarget,
        config: TransferConfig,
        graph: GraphSource,
        chosen: Sequence[int],
        seed: int,
        device: torch.device,
    ) -> None:
        train, features, head = target.train, config.features, config.head
        words = [[side[i] for i in chosen] for side in train.words]
        table = word_table(
            features,
            (w for side in words for text in side for w in text),
            (w for side in target.test.words for text in side for w in text),
            seed,
        )
        self.device, self.target = device, target
        self.rows = [[table.encode(text) for text in side] for side in words]
        self.test_rows = [[table.encode(text) for text in side] for side in target.test.words]
        self.labels = [train.labels[i] for i in chosen]
        self.lengths = [len(x) + len(y) for x, y in zip(*self.rows, strict=True)]
        ids = [[side[i] for i in chosen] for side in train.ids]
        self.graphs = PairRows(config.graph.joined, ids[0], ids[1]).cached(graph, device)
        self.test_graphs = PairRows(config.graph.joined, *target.test.ids).cached(graph, device)
        torch.manual_seed(seed)
        self.model = PairClassifier(
            WordFeatures(table, features.kind == "learned", features.chars),
            graph,
            len(target.classes),
            config.graph.joined,
            features.states,
            head.kind,
            head.hidden,
            head.dropout,
            **mixing(config),
        )
        self.patterns, self.counts = self.model.layer_patterns(), table.counts

    def loss(self, indices: Sequence[int]) -> tuple[Tensor, int, int]:
        first, second = (padded([side[i] for i in indices], self.device) for side in self.rows)
        labels = torch.tensor([self.labels[i] for i in indices], device=self.device)
        scores = self.model(first, second, [cache.batch(indices) for cache in self.graphs])
        return F.cross_entropy(scores, labels), len(indices), int(first[1].sum() + second[1].sum())

    @torch.no_grad()
    def test(self) -> dict[str, float]:
        self.model.eval()
        lengths = [len(x) + len(y) for x, y in zip(*self.test_rows, strict=True)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        right = 0
        for start in range(0, len(order), TEST_BATCH):
            part = order[start : start + TEST_BATCH]
            first, second = (padded([side[i] for i in part], self.device) for side in self.test_rows)
            scores = self.model(first, second, [cache.batch(part) for cache in self.test_graphs])
            found = scores.argmax(-1).tolist()
            right += sum(self.target.test.labels[i] == label for i, label in zip(part, found, strict=True))
        return {"accuracy": right / len(order)}
