"""The [slices] section of a recipe: kinds of texts that matter or that are hard, with heads of their own."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glomo.errors import UserError
from glomo.training.document_classifier import DocumentClassifier
from glomo.training.documents import figures_of
from glomo.transfer.signal import SliceHeads, slice_members


@dataclass(frozen=True)
class Slices:
    """The [slices] section. Raises UserError for a pattern without a name, for one that is no regular expression, and
    for two of one name."""

    patterns: tuple[str, ...] = ()
    r"""slices as "name: regular expression" of the texts that are in it (found anywhere in them), with commas between
    (a comma within is written \x2c); each has a head of its own in training (slice-based learning)"""

    def __post_init__(self) -> None:
        names = [text.partition(":")[0].strip() for text in self.patterns]
        for text, name in zip(self.patterns, names, strict=True):
            if not (re.fullmatch(r"\w[\w .-]*", name) and text.partition(":")[2].strip()):
                raise UserError(f'slices.patterns has {text!r}; "name: regular expression" is needed')
            if names.count(name) > 1:
                raise UserError(f"slices.patterns has two slices called {name!r}; each needs a name of its own")
        self.functions()

    def check(self, teachers: Sequence[str], tsa: str, smoothing: float) -> None:
        """Raises UserError where there are slices and something else has a loss of its own of the labels."""
        others = {"distil.teachers": ",".join(teachers), "unlabelled.tsa": tsa, "classifier.smoothing": smoothing}
        for key, value in others.items():
            if self.patterns and value not in ("", "none", 0):
                raise UserError(
                    f"{key} is {value!r}, but slices.patterns have a loss of their own of the labels; give one of them"
                )

    def functions(self) -> dict[str, Callable[[str], bool]]:
        """{slice: whether a text is in it}."""
        found: dict[str, Callable[[str], bool]] = {}
        for text in self.patterns:
            name, _, pattern = text.partition(":")
            try:
                found[name.strip()] = functools.partial(_found, re.compile(pattern.strip()))
            except re.error as error:
                raise UserError(f"slices.patterns has {text!r}, which is no regular expression: {error}") from None
        return found


def _found(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.search(text) is not None


def insert_slices(settings: Slices, classifier: DocumentClassifier) -> None:
    """Put heads of slices around a classifier's head, if there are slices."""
    if settings.patterns:
        width = 3 * classifier.language_model.config.dim
        classifier.head = SliceHeads(classifier.head, width, list(settings.functions()))


class SlicedExamples:
    """Which of a task's examples are in which slices.

    Args:
        train: the texts to train on.
        test: those of the test.

    Raises:
        UserError: a slice has no example to train on.
    """

    def __init__(self, settings: Slices, train: Sequence[str], test: Sequence[str]) -> None:
        functions = settings.functions()
        self.names = list(functions)
        self.train, self.test = slice_members(train, functions), slice_members(test, functions)
        for text, found in zip(settings.patterns, self.train.any(0).tolist(), strict=True):
            if not found:
                raise UserError(
                    f"slices.patterns has {text!r}, and none of the {len(train)} texts to train on is in it"
                )

    def loss(self, model: DocumentClassifier, features: Tensor, labels: Tensor, indices: Sequence[int]) -> Tensor:
        """That of the labels and of the slices, on the training examples of these numbers (`SliceHeads.loss`)."""
        assert isinstance(model.head, SliceHeads)
        return model.head.loss(features, labels, self.train[torch.tensor(indices)].to(labels.device))

    def figures(self, found: Tensor, labels: Sequence[int]) -> dict[str, dict[str, Any]]:
        """{slice: {examples, accuracy}} of the test's probabilities (N, classes); without examples no accuracy."""
        figures: dict[str, dict[str, Any]] = {}
        for name, members in zip(self.names, self.test.T, strict=True):
            rows = members.nonzero()[:, 0].tolist()
            accuracy = figures_of(found[rows], [labels[row] for row in rows])["accuracy"] if rows else None
            figures[name] = {"examples": len(rows), "accuracy": accuracy}
        return figures
