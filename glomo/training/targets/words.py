"""What the words of a labelled task are to its model: a vector each, and what their characters say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.training.targets.contextual import ContextFeatures, context_table
from glomo.training.targets.target import Setting
from glomo.training.transfer_config import Features

MOST_CHARACTERS = 16  # of a word; longer ones are cut
KERNEL = 5
CHARACTER_DIM = 16


class FeatureTable(Protocol):
    """What makes features of texts: a row for each of their words, and a module of the rows."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What the features cannot see of the texts."""

    def encode(self, words: Iterable[str]) -> list[int]:
        """The rows of a text, one of those that the table was made for."""

    def features(self, settings: Features) -> WordFeatures | ContextFeatures: ...


@dataclass(frozen=True)
class WordTable:
    """The words that a model knows: row 0 is padding and row 1 an unknown word, both zero."""

    rows: dict[str, int]
    vectors: Tensor
    """(V, dim)"""
    characters: Tensor | None = None
    """(V, MOST_CHARACTERS) int32, 0 behind the word and 1 for characters that the training texts lack"""
    unseen_characters: int = 0
    """words with a character that the training texts lack"""

    @property
    def counts(self) -> dict[str, int]:
        unseen = {"words with a character that the training texts lack": self.unseen_characters}
        without = int((self.vectors[2:] == 0).all(1).sum())
        return (unseen if self.characters is not None else {}) | (
            {"words without a vector": without} if without else {}
        )

    def encode(self, words: Iterable[str]) -> list[int]:
        return [self.rows.get(word, 1) for word in words]

    def features(self, settings: Features) -> WordFeatures:
        return WordFeatures(self, settings.kind == "learned", settings.chars)


def feature_table(setting: Setting, train: Iterable[Sequence[str]], test: Iterable[Sequence[str]]) -> FeatureTable:
    """The table of a task's texts, as `features.kind` has it."""
    features = setting.config.features
    if features.kind == "contextual":
        return context_table(features, train, test, setting.device)
    return word_table(features, train, test, setting.seed)


def word_table(
    features: Features, train: Iterable[Sequence[str]], test: Iterable[Sequence[str]], seed: int
) -> WordTable:
    """The table of the words of a task's texts.

    Learned vectors exist for the words of the labelled training texts only; those that stay as they are, for all. With
    characters every word of the task has a row, whose vector is zero where there is none.
    """
    in_training = {word for text in train for word in text}
    only_training = features.kind == "learned" and not features.chars
    words = sorted(in_training if only_training else in_training | {word for text in test for word in text})
    if features.kind == "glove-50d":
        known, table = glove()
        found = [known.get(word.strip().lower(), -1) for word in words]
        if not features.chars:
            words = [word for word, row in zip(words, found, strict=True) if row >= 0]
            found = [row for row in found if row >= 0]
        vectors = torch.tensor(table[[max(row, 0) for row in found]])
        vectors[torch.tensor(found, dtype=torch.int64) < 0] = 0
    else:
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(len(words), features.dim, generator=generator)
        if features.kind == "learned":
            vectors *= 0.1  # small beside what training adds
            vectors[[word not in in_training for word in words]] = 0
    rows = {word: row for row, word in enumerate(words, start=2)}
    vectors = torch.cat([vectors.new_zeros(2, vectors.shape[1]), vectors])
    if not features.chars:
        return WordTable(rows, vectors)
    codes = {char: code for code, char in enumerate(sorted({char for word in in_training for char in word}), start=2)}
    characters = torch.zeros(len(rows) + 2, MOST_CHARACTERS, dtype=torch.int32)
    unseen = 0
    for word, row in rows.items():
        coded = [codes.get(char, 1) for char in word[:MOST_CHARACTERS]]
        characters[row, : len(coded)] = torch.tensor(coded, dtype=torch.int32)
        unseen += 1 in coded
    return WordTable(rows, vectors, characters, unseen)


class WordFeatures(nn.Module):
    """Rows of a table to features `(B, T, dim)`: the vectors, and behind them, with `filters`, a character CNN.

    .. code-block:: text

        c(word)_f = max_i relu(W_f . [e_i ; ... ; e_{i+4}] + b_f),    e the embedded characters, with padding around

    Source: Kim, EMNLP 2014, on characters as in Seo et al., ICLR 2017 (BiDAF).
    """

    def __init__(self, table: WordTable, train_vectors: bool, filters: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(table.vectors.clone(), freeze=not train_vectors, padding_idx=0)
        self.dim = table.vectors.shape[1] + filters
        self.filters = filters
        if filters:
            assert table.characters is not None
            # follows from the task's words: no weight, and not saved
            self.register_buffer("table", table.characters, persistent=False)
            self.characters = nn.Embedding(int(table.characters.max()) + 1, CHARACTER_DIM, padding_idx=0)
            self.conv = nn.Conv1d(CHARACTER_DIM, filters, KERNEL, padding=KERNEL // 2)

    def forward(self, rows: Tensor) -> Tensor:
        vectors = self.embedding(rows)
        if not self.filters:
            return vectors
        words, places = rows.unique(return_inverse=True)  # a word is looked at once a batch
        spelled = self.characters(self.get_buffer("table")[words].long()).mT
        filtered = self.conv(spelled).relu().amax(-1)
        # not filtered[places], whose gradient depends on the number of threads in its last bits
        return torch.cat([vectors, F.embedding(places, filtered)], -1)


_glove_cache: list[tuple[dict[str, int], Any]] = []


def glove() -> tuple[dict[str, int], Any]:
    """{word: row} and the table, read once: 400,000 words take seconds."""
    if not _glove_cache:
        from glomo.data.catalogue import load_vectors

        words, table = load_vectors("glove-50d")
        _glove_cache.append(({word: row for row, word in enumerate(words)}, table))
    return _glove_cache[0]
