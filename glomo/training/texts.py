"""Where the texts of a recipe come from (files of one's own, the catalogue, the synthetic recall task), and their
vocabulary."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from glomo.data import AnyVocabulary, Subwords, Vocabulary, read_labelled, read_texts
from glomo.errors import UserError
from glomo.training.config import check_range

RECALL = "recall"  # the synthetic task's name among the data sets
_RECALL_SIZES = {"unlabelled": (20_000, 1), "train": (2_000, 2), "test": (500, 3)}  # how many, and the seed

Labelled = list[tuple[str, str]]


@dataclass(frozen=True)
class LabelledData:
    """What every [data] section of a labelled task has."""

    train: str = ""
    """your own training file (.csv .tsv .jsonl); with data.test, and then data.dataset is not read"""
    test: str = ""
    """your own test file"""
    dataset: str = ""
    """a name from the catalogue (`glomo data ls`), or recall, a synthetic task"""
    text_column: str = "text"
    """the text's column"""
    label_column: str = "label"
    """the label's column"""
    labels: int = 0
    """labelled examples to train on, drawn anew for every seed; 0: all"""
    test_dataset: str = ""
    """a name from the catalogue whose test split is taken in place of its own: another domain's"""

    def __post_init__(self) -> None:
        check_range("data.labels", self.labels, 0)


def task_name(data: Mapping[str, Any]) -> str:
    """How the task of a [data] section is called: its training file without the ending, or its data set."""
    return Path(data["train"]).stem if data["train"] else str(data["dataset"])


def unlabelled(files: Sequence[str], datasets: Sequence[str], column: str) -> list[str]:
    """All texts of the files, or, when there is none, of the data sets. Raises UserError when neither is named."""
    if files:
        return [text for path in files for text in read_texts(path, column)]
    if not datasets:
        raise UserError("the recipe names no text: give --data.text FILE or --data.dataset NAME (see `glomo data ls`)")
    from glomo.data.catalogue import load_texts

    return [
        text for name in datasets for text in (_recall_unlabelled() if name == RECALL else load_texts(name, "train"))
    ]


def labelled(data: LabelledData) -> tuple[Labelled, Labelled]:
    """(training, test) examples as (text, label), of two files, or, when there are none, of a data set."""
    files, columns = (data.train, data.test), (data.text_column, data.label_column)
    if any(files):
        if not all(files):
            raise UserError("a task needs two files, --data.train FILE and --data.test FILE; only one is given")
        return read_labelled(data.train, *columns), read_labelled(data.test, *columns)
    if not data.dataset:
        raise UserError(
            "the recipe names no task: give --data.train FILE and --data.test FILE, or --data.dataset NAME "
            "(see `glomo data ls`)"
        )
    if data.dataset == RECALL:
        return _recall_labelled("train"), _recall_labelled("test")
    from glomo.data.catalogue import load_labelled

    return load_labelled(data.dataset, "train"), load_labelled(data.test_dataset or data.dataset, "test")


def sample(count: int, labels: int, seed: int) -> list[int]:
    """The labelled examples that data.labels leaves of so many (0: all)."""
    everything = list(range(count))
    return sorted(random.Random(seed).sample(everything, labels)) if 0 < labels < count else everything


class VocabularySettings(Protocol):
    """What a [data] section says of the vocabulary."""

    @property
    def vocabulary(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def min_count(self) -> int: ...
    @property
    def lowercase(self) -> bool: ...
    @property
    def digits(self) -> bool: ...


def build_vocabulary(texts: Sequence[str], data: VocabularySettings, buckets: int = 0) -> AnyVocabulary:
    """The vocabulary that a [data] section asks for, of words with so many buckets."""
    if data.vocabulary == "subwords":
        return Subwords.train(texts, data.vocab_size)
    mark = "N" if data.digits else None
    return Vocabulary.build(texts, data.vocab_size, data.min_count, data.lowercase, mark, buckets)


def running_units(texts: Iterable[str], vocabulary: AnyVocabulary, end: int) -> Tensor:
    """All texts in one row of units, with ``end`` before the first and behind each."""
    units = [end]
    for text in texts:
        units += [*vocabulary.encode(text), end]
    return torch.tensor(units, dtype=torch.int32)


def fingerprint(texts: Iterable[str]) -> str:
    """The sha256 (hex) of the texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _recall_unlabelled() -> list[str]:
    from glomo.data.recall import Recall

    task, words = Recall(), Recall().vocabulary.words
    return [" ".join(words[unit] for unit in units) for units in task.unlabelled(*_RECALL_SIZES["unlabelled"])]


def _recall_labelled(split: str) -> Labelled:
    from glomo.data.recall import Recall

    task, words = Recall(), Recall().vocabulary.words
    examples = task.labelled(*_RECALL_SIZES[split])
    return [(" ".join(words[unit] for unit in units), str(label)) for units, label in examples]
