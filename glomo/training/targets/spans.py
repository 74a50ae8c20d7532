"""Questions whose answer is a span of a paragraph as a target task."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glomo.data import AnyVocabulary, Vocabulary
from glomo.data.spans import SpanExample, exact_match, read_spans, span_f1
from glomo.errors import UserError
from glomo.training.targets.reader import SpanReader, best_spans, span_loss
from glomo.training.targets.target import (
    PairRows,
    Setting,
    check_head,
    divided,
    fingerprint,
    mixing,
    padded,
    sampled,
    units_of,
)
from glomo.training.targets.words import feature_table
from glomo.training.transfer_config import TransferConfig, TransferData

LONGEST_ANSWER = 15  # units
TEST_UNITS = 16_000  # of paragraphs, padding included, at a time


def spans(data: TransferData) -> tuple[list[SpanExample], list[SpanExample]]:
    """(training, test) questions."""
    files = (data.train, data.test)
    if any(files):
        if not all(files):
            raise UserError("a task needs two files, --data.train FILE and --data.test FILE; only one is given")
        return read_spans(data.train), read_spans(data.test)
    from glomo.data.catalogue import load_spans

    return load_spans(data.dataset, "train"), load_spans(data.test_dataset or data.dataset, "test")


class Questions:
    """Questions as the units of the graph's vocabulary; every paragraph is encoded once."""

    def __init__(self, examples: Sequence[SpanExample], vocabulary: Vocabulary, length: int) -> None:
        self.examples = list(examples)
        encoded: dict[str, tuple[list[int], list[str], list[tuple[int, int]]]] = {}
        for example in examples:
            if example.paragraph not in encoded:
                places = vocabulary.spans(example.paragraph)[: length or None] or [(0, 0)]
                encoded[example.paragraph] = (*units_of(vocabulary, example.paragraph, len(places)), places)
        self.paragraphs = [encoded[example.paragraph] for example in examples]
        self.questions = [units_of(vocabulary, example.question, 0) for example in examples]
        self.answers = [_answer_units(x, places) for x, (*_, places) in zip(examples, self.paragraphs, strict=True)]
        """first and last unit of each question's first answer, or None"""

    def __len__(self) -> int:
        return len(self.examples)

    def with_answer(self) -> Questions:
        """Those whose answer stands whole in what was kept of the paragraph."""
        kept = [i for i, answer in enumerate(self.answers) if answer is not None]
        part = copy.copy(self)
        for name in ("examples", "paragraphs", "questions", "answers"):
            values = getattr(self, name)
            setattr(part, name, [values[i] for i in kept])
        return part

    def text(self, index: int, first: int, last: int) -> str:
        """The characters of a paragraph from a first to a last unit."""
        places = self.paragraphs[index][2]
        return self.examples[index].paragraph[places[first][0] : places[last][1]]

    def inexact(self) -> int:
        """How many first answers begin or end within a unit."""
        return sum(
            answer is not None and self.text(i, *answer) != self.examples[i].answers[0][1]
            for i, answer in enumerate(self.answers)
        )


def _answer_units(example: SpanExample, places: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """First and last unit of the first answer; None if it does not stand whole in the units. An answer that begins or
    ends within a unit has all of that unit."""
    start, text = example.answers[0]
    end = start + len(text)
    first = bisect.bisect_right(places, start, key=lambda place: place[1])
    last = bisect.bisect_left(places, end, key=lambda place: place[0]) - 1
    return (first, last) if places[-1][1] >= end and first <= last else None


class SpanTarget:
    """The `Target` of spans. Training paragraphs are cut at data.length, and questions whose answer is then not whole
    are left out (`counts` says how many); test paragraphs are read whole."""

    measures = ("f1", "exact_match")

    def __init__(self, config: TransferConfig, vocabulary: AnyVocabulary) -> None:
        if not isinstance(vocabulary, Vocabulary):
            raise UserError("answers are spans of words, but the units of the graph are none; one of words is needed")
        check_head(config, "pooling")  # the default: the reader has its own
        train, test = spans(config.data)
        if config.data.judge == "valid":
            train, test = divided(train, [example.article or example.paragraph for example in train])
        everything = Questions(train, vocabulary, config.data.length)
        self.train = everything.with_answer()
        if not len(self.train):
            raise UserError(
                f"no answer stands within the first {config.data.length} units; a larger data.length is needed"
            )
        test = sampled(test, config.data.judged)
        self.test = Questions(test, vocabulary, 0)
        ids = [[text[0] for text in texts] for texts in (self.test.paragraphs, self.test.questions)]
        self.test_ids = PairRows(config.graph.joined, ids[0], ids[1]).rows[0]
        seen = {example.paragraph for example in train}
        self.counts = {
            "training": len(self.train),
            "left out, their answer is cut off": len(train) - len(self.train),
            "training answers that begin or end within a word": self.train.inexact(),
            "test": len(test),
            "test questions whose paragraph is in training too": sum(x.paragraph in seen for x in test),
        }
        self.meta: dict[str, Any] = {"kind": "span-reader"}
        self.fingerprint = fingerprint(
            self.train.examples, self.test.examples, config.data.length, vocabulary.fingerprint
        )

    def __len__(self) -> int:
        return len(self.train)

    def check(self, chosen: Sequence[int], seed: int) -> None:
        """Any will do."""

    def trial(self, setting: Setting) -> SpanTrial:
        return SpanTrial(self, setting)


class SpanTrial:
    def __init__(self, target: SpanTarget, setting: Setting) -> None:
        self.target, self.chosen, self.device, self.graph = target, setting.chosen, setting.device, setting.graph
        train, test, features, head = target.train, target.test, setting.config.features, setting.config.head
        in_training = [texts[i][1] for texts in (train.paragraphs, train.questions) for i in self.chosen]
        in_test = [text[1] for texts in (test.paragraphs, test.questions) for text in texts]
        self.table = feature_table(setting, in_training, in_test)
        self.lengths = [len(train.paragraphs[i][0]) for i in self.chosen]
        self.joined = setting.config.graph.joined
        torch.manual_seed(setting.seed)
        self.model = SpanReader(
            self.table.features(features),
            self.graph,
            self.joined,
            features.states,
            head.hidden,
            head.dropout,
            **mixing(setting.config),
        )
        self.patterns, self.counts = self.model.layer_patterns(), self.table.counts

    def _scores(self, questions: Questions, indices: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        """The reader's scores, and how many units it has read."""
        paragraph, question = (
            padded([self.table.encode(texts[i][1]) for i in indices], self.device)
            for texts in (questions.paragraphs, questions.questions)
        )
        # too many to keep: 20,000 paragraphs with their questions are gigabytes of queries and keys
        ids = [[texts[i][0] for i in indices] for texts in (questions.paragraphs, questions.questions)]
        graphs = [
            self.graph.queries_keys(*padded(rows, self.device)) for rows in PairRows(self.joined, ids[0], ids[1]).rows
        ]
        start, end = self.model(paragraph, question, graphs)
        return start, end, int(paragraph[1].sum() + question[1].sum())

    def loss(self, indices: Sequence[int]) -> tuple[Tensor, int, int]:
        chosen = [self.chosen[i] for i in indices]
        right = [self.target.train.answers[i] for i in chosen]
        start, end, units = self._scores(self.target.train, chosen)
        return span_loss(start, end, torch.tensor(right, device=self.device)), len(indices), units

    @torch.no_grad()
    def test(self) -> dict[str, float]:
        self.model.eval()
        test = self.target.test
        lengths = [len(paragraph[0]) for paragraph in test.paragraphs]
        order = sorted(range(len(test)), key=lengths.__getitem__)
        f1 = exact = 0.0
        while order:
            size = max(1, TEST_UNITS // lengths[order[-1]])
            part, order = order[-size:], order[:-size]
            start, end, _ = self._scores(test, part)
            for i, (first, last) in zip(part, best_spans(start, end, LONGEST_ANSWER).tolist(), strict=True):
                right = [text for _, text in test.examples[i].answers]
                answer = test.text(i, first, last)
                f1, exact = f1 + span_f1(answer, right), exact + exact_match(answer, right)
        return {"f1": f1 / len(test), "exact_match": exact / len(test)}
