"""Key-value recall: a synthetic task that can only be solved by a link between two places of a sequence.

A sequence holds a few key-value pairs among fillers, then the question mark ``Q`` and one of its keys; the value
bound to that key follows. With keys K, values V and fillers f::

    fc Kg Vb fa fh Ka Vi Kd Vd fc Kb Ve fa Q Ka      -> Vi, whose class is the label

Pre-training sees unlabelled sequences that ask for every pair in turn and give the answers, ``... fa Q Ka Vi Q Kd Vd
...`` (predicting an answer needs the link from the second Ka to the first); the labelled task sees one question without
its answer. Reading the label needs "which value stands behind the earlier place of this key", a relation and not a
feature, so it shows what a transferred graph can do. It is no real data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glomo.data.vocabulary import Vocabulary
from glomo.errors import UserError


@dataclass(frozen=True)
class Recall:
    """The task and its sizes. Ids: 0 padding, 1 unknown, 2 ``Q``, then keys, values, fillers.

    Attributes:
        keys, values, fillers: how many different units of each there are.
        pairs: key-value pairs in a sequence; their keys are different.
        length: units before ``Q``, pairs and fillers together, at least ``2 * pairs``.
        classes: value number v has the class ``v % classes``.
    """

    keys: int = 16
    values: int = 16
    fillers: int = 16
    pairs: int = 4
    length: int = 16
    classes: int = 4

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.pairs > self.keys:
            raise UserError(
                f"recall: {self.pairs} pairs of different keys cannot be drawn from {self.keys} keys; 1 to "
                f"{self.keys} can"
            )
        if self.length < 2 * self.pairs:
            raise UserError(
                f"recall: a length of {self.length} has no room for {self.pairs} pairs; at least {2 * self.pairs} is "
                "needed"
            )
        if not 2 <= self.classes <= self.values:
            raise UserError(
                f"recall: {self.classes} classes of {self.values} values are not possible; 2 to {self.values} are"
            )
        if self.fillers < 1:
            raise UserError(f"recall: {self.fillers} fillers are too few; at least 1 is needed")

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids as words: ``<pad> <unk> Q Ka Kb ... Va Vb ... fa fb ...``; it encodes such words back, too.

        Numbers are written in letters (``_letters``), so that the words also stay apart in a vocabulary that makes text
        lower case or has one mark for all tokens with a digit.
        """
        counts = (("K", self.keys), ("V", self.values), ("f", self.fillers))
        words = ["Q", *(kind + _letters(i) for kind, count in counts for i in range(count))]
        return Vocabulary(words, lowercase=False, digits=None)

    def unlabelled(self, n: int, seed: int) -> list[list[int]]:
        """``n`` sequences for pre-training: pairs and fillers, then ``Q key value`` for every pair, in a random order.

        Each has ``length + 3 * pairs`` ids. With one question a sequence, so few units could be predicted better by a
        link that a short training does not find it.
        """
        return [
            [*sequence, *(unit for key, value in asked for unit in (2, key, value))]
            for sequence, asked in self._draw(n, seed)
        ]

    def labelled(self, n: int, seed: int) -> list[tuple[list[int], int]]:
        """``n`` examples: a sequence of ``length + 2`` ids, and the class of the bound value.

        Take other seeds than for pre-training, and another one for the test.
        """
        return [
            ([*sequence, 2, key], (value - 3 - self.keys) % self.classes)
            for sequence, ((key, value), *_) in self._draw(n, seed)
        ]

    def _draw(self, n: int, seed: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """(pairs and fillers, the (key, value) pairs in the order they are asked for)."""
        random = np.random.default_rng(seed)
        drawn = []
        for _ in range(n):
            keys = 3 + random.permutation(self.keys)[: self.pairs]
            values = 3 + self.keys + random.integers(self.values, size=self.pairs)
            fillers = 3 + self.keys + self.values + random.integers(self.fillers, size=self.length - 2 * self.pairs)
            pairs = list(zip(keys.tolist(), values.tolist(), strict=True))
            # A random order of pairs and fillers, in which a pair stays together; the pairs are asked for in the order
            # they were drawn, which is independent of it.
            pieces = [*pairs, *((filler,) for filler in fillers.tolist())]
            drawn.append(([unit for i in random.permutation(len(pieces)) for unit in pieces[i]], pairs))
        return drawn


def _letters(number: int) -> str:
    """0, 1, ... 25, 26, ... as a, b, ... z, ba, ..."""
    rest = _letters(number // 26) if number >= 26 else ""
    return rest + "abcdefghijklmnopqrstuvwxyz"[number % 26]
