"""The [names] section of a recipe: labels are the vectors of their names, or their attributes, and classes without
examples are known."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glomo.data import label_names
from glomo.data.vectors import read_vectors
from glomo.errors import UserError
from glomo.training.attribute_labels import AttributeLabels, attribute_tables
from glomo.training.config import check_range, nearest
from glomo.training.document_classifier import DocumentClassifier
from glomo.training.documents import Documents, logits, probabilities
from glomo.training.texts import Labelled, fingerprint
from glomo.transfer.zero_shot import (
    conse_embedding,
    devise_loss,
    generalised_accuracy,
    hit_at_k,
    label_scores,
    label_vectors,
    max_hinge_loss,
)
from glomo.transfer.zero_shot.word_labels import words_of


@dataclass(frozen=True)
class Names:
    """The [names] section. Raises UserError for values out of range."""

    vectors: str = ""
    """word vectors of the labels' names: glove-50d, or a file of lines of a word and its numbers; empty: names are only
    names"""
    method: Literal["devise", "hinge", "conse", "attributes"] = "devise"
    """devise: the head's vector is to be nearer to its label's than to all others'; hinge: than to the nearest other in
    the batch, and labels go through a linear map that is learned; conse: a classifier as usual, whose most probable
    classes say where among the vectors a text is; attributes: the head says which attributes a text's class has"""
    attributes: str = ""
    """of attributes, in place of vectors: what each class is like, those without examples too: a .csv file whose header
    is class and the attributes, with a row of 0 and 1 for each class; or trec-fine, which comes with glomo"""
    unseen: tuple[str, ...] = ()
    """classes that nothing is trained on, with commas between; they are tested on all their examples"""
    held_out: int = 0
    """or so many classes, drawn anew for every seed"""
    margin: float = 0.0
    """how much nearer; 0: 0.1 of devise, 1 of hinge"""
    top: int = 10
    """of conse: how many classes say it"""

    def __post_init__(self) -> None:
        check_range("names.held_out", self.held_out, 0)
        check_range("names.margin", self.margin, 0)
        check_range("names.top", self.top, 1)
        if self.unseen and self.held_out:
            raise UserError(
                f"names.unseen has {len(self.unseen)} classes, and names.held_out draws {self.held_out}; give one of "
                "them"
            )
        needed, other = ("attributes", "vectors") if self.method == "attributes" else ("vectors", "attributes")
        if given := getattr(self, other):
            raise UserError(
                f"names.{other} is {given!r}, which names.method = {self.method!r} does not read; names.{needed} (now "
                f"{getattr(self, needed)!r}) is needed alone"
            )
        if self.method == "attributes" and not self.attributes:
            raise UserError(
                "names.method is 'attributes', and names.attributes is empty; a .csv file of classes and their "
                "attributes is needed, or a table that comes with glomo, such as trec-fine"
            )
        if (self.unseen or self.held_out) and not self.given:
            raise UserError("names.vectors is empty; classes that are not trained on need vectors, such as glove-50d")

    @property
    def given(self) -> str:
        """The key that says what the classes are like, with its value; empty where none does."""
        keys = ("vectors", "attributes")
        return next((f"names.{key} is {getattr(self, key)!r}" for key in keys if getattr(self, key)), "")

    def tables(self, *groups: Sequence[str]) -> list[Tensor]:
        """For the names of each group their vectors of length 1, (names, dim), or signatures, (names, attributes).
        Raises UserError for a name without one."""
        try:
            if self.attributes:
                return attribute_tables(self.attributes, groups)
            words = {part for group in groups for name in group for part in (name, *words_of(name))}
            found = self._read(words | {word.lower() for word in words})
            return [label_vectors(group, found) for group in groups]
        except ValueError as error:
            raise UserError(f"{self.given}: {error}") from None

    def _read(self, words: set[str]) -> Mapping[str, Any]:
        if Path(self.vectors).suffix or "/" in self.vectors:
            return read_vectors(self.vectors, words)
        from glomo.data.catalogue import load_vectors

        return {word: row for word, row in zip(*load_vectors(self.vectors), strict=True) if word in words}


def check_alone(names: Names, distil: bool, unlabelled: bool, slices: bool, smoothing: float) -> None:
    """Raises UserError where [distil], [unlabelled], [slices] or label smoothing is given beside [names]."""
    others = {"distil.teachers": distil, "unlabelled.method": unlabelled, "slices.patterns": slices}
    for key in (key for key, given in others.items() if given):
        raise UserError(f"{names.given}, which goes without {key}; give one of them")
    if smoothing and names.method != "conse":
        raise UserError(
            f"classifier.smoothing is {smoothing}, and the loss of names.method = {names.method!r} has none; set it to "
            "0"
        )


class LabelSpace(nn.Module):
    """Labels in one space with what the head says. ``table`` (classes, dim), a buffer, has the vectors of the names.

    .. code-block:: text

        logits = f(x) . g(y),     g(y) = y with devise, W y with hinge
    """

    table: Tensor

    def __init__(self, settings: Names, table: Tensor) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("table", table)
        dim = table.size(1)
        self.map = nn.Linear(dim, dim, bias=False) if settings.method == "hinge" else nn.Identity()

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, dim) -> (B, classes)."""
        return label_scores(vectors, self.map(self.table))

    def loss(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Of (B, dim) and the numbers of their labels (B,)."""
        if self.settings.method == "hinge":
            own = self.map(self.table)[labels]
            return max_hinge_loss(vectors, own, labels, self.settings.margin or 1.0)
        return devise_loss(vectors, self.table, labels, self.settings.margin or 0.1)


AnyLabels = LabelSpace | AttributeLabels


def make_labels(settings: Names, classes: Sequence[str], table: Tensor) -> AnyLabels:
    """What makes scores of these classes out of what the head says. ``table``: their rows of `Names.tables`."""
    return AttributeLabels(classes, table) if settings.attributes else LabelSpace(settings, table)


@contextmanager
def _among(labels: AnyLabels, table: Tensor) -> Iterator[None]:
    """Within it the labels are those of another table."""
    name = "signatures" if isinstance(labels, AttributeLabels) else "table"
    seen = labels.get_buffer(name)
    setattr(labels, name, table.to(seen.device))
    try:
        yield
    finally:
        setattr(labels, name, seen)


def name_scores(
    settings: Names,
    model: DocumentClassifier,
    ids: Sequence[list[int]],
    seen: Tensor,
    names: Tensor,
    device: torch.device,
) -> Tensor:
    """How near documents are to names, (documents, names), of a model that was trained on the ``seen`` ones.

    Raises UserError where the seen ones have other attributes than in the training.
    """
    if isinstance(model.labels, AttributeLabels):
        model.labels.check_same(seen)
    if isinstance(model.labels, AnyLabels):
        with _among(model.labels, names):
            return logits(model, ids, device)
    return label_scores(conse_embedding(probabilities(model, ids, device), seen, settings.top), names, cosine=True)


class NamedTask:
    """A task in two parts: the classes that are trained on, and those that are kept from it (none without [names]).

    Raises UserError where a class has no vector (or no attributes), where an unseen class is none, and where fewer than
    two are left.
    """

    def __init__(self, settings: Names, train: Labelled, test: Labelled, seed: int) -> None:
        self.settings = settings
        self.unseen = _unseen(settings, sorted({label for _, label in train}), {label for _, label in test}, seed)
        self.train, self.test = ([e for e in examples if e[1] not in self.unseen] for examples in (train, test))
        self.withheld = [e for e in [*train, *test] if e[1] in self.unseen]
        self.seen = label_names(self.train)
        if not self.test:
            raise UserError("the test examples are all of the classes in names.unseen; the others are tested as well")
        self.classes = [*self.seen, *self.unseen]
        self.table = settings.tables(self.classes)[0] if settings.given else torch.empty(len(self.classes), 0)

    @property
    def seen_table(self) -> Tensor:
        """(seen classes, dim)."""
        return self.table[: len(self.seen)]

    @property
    def in_space(self) -> bool:
        """Whether the classifier says vectors or attributes; else it says logits of the seen classes."""
        return bool(self.settings.given) and self.settings.method != "conse"

    @property
    def outputs(self) -> int:
        """Numbers that the head gives."""
        return self.table.size(1) if self.in_space else len(self.seen)

    @property
    def fingerprint(self) -> str:
        """Of the names with their rows, and of the examples that are kept back."""
        rows = [f"{name} {row.tolist()}" for name, row in zip(self.classes, self.table, strict=True)]
        return fingerprint([*rows, *("\t".join(e) for e in self.withheld)])

    def insert(self, model: DocumentClassifier) -> None:
        """Make the seen labels a part of a classifier with so many `outputs`."""
        if self.in_space:
            model.labels = make_labels(self.settings, self.seen, self.seen_table)

    def figures(
        self, model: DocumentClassifier, test: Documents, withheld: Documents, device: torch.device
    ) -> dict[str, Any]:
        """What a model is worth on the unseen classes; an accuracy is the mean over its classes.

        .. code-block:: text

            accuracy, chance         among the unseen classes alone; 1 / how many there are
            seen, unseen, harmonic   `generalised_accuracy` of the test and the unseen examples, among all classes
            classes, examples        the unseen ones, and how many examples they have

        All examples of the unseen classes count, also those of the training file: nothing was trained on their labels.
        """
        ids, labels = [*test.ids, *withheld.ids], torch.tensor([*test.labels, *withheld.labels])
        scores = name_scores(self.settings, model, ids, self.seen_table, self.table, device)
        both = generalised_accuracy(scores, labels, range(len(self.seen)))
        first = len(self.seen)
        alone, target = scores[len(test) :, first:], labels[len(test) :] - first
        of_class = [hit_at_k(alone[target == c], target[target == c]) for c in range(len(self.unseen))]
        found = {"accuracy": statistics.fmean(of_class), "chance": 1 / len(self.unseen), **both._asdict()}
        return {**found, "classes": self.unseen, "examples": len(withheld)}


def _unseen(settings: Names, classes: Sequence[str], tested: set[str], seed: int) -> list[str]:
    """The classes that are kept from training, in their order."""
    named = sorted(set(settings.unseen))
    known = sorted({*classes, *tested})
    for name in named:
        if name not in known:
            raise UserError(f"names.unseen has {name!r}, which is no class of the data{nearest(name, known)}")
    left = len(classes) - settings.held_out - sum(name in classes for name in named)
    if left < 2 and (named or settings.held_out):
        what = "names.unseen names" if named else "names.held_out draws"
        raise UserError(
            f"{what} {len(named) or settings.held_out} of {len(classes)} classes, which leaves {max(left, 0)} to train "
            "on; at least 2 are needed"
        )
    return named or sorted(random.Random(f"names {seed}").sample(list(classes), settings.held_out))
