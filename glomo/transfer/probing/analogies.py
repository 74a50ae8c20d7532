"""Word vectors: analogies, and similarity as people judge it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.errors import UserError
from glomo.nn.precision import wide
from glomo.transfer.probing.correlation import spearman

Question = tuple[str, str, str, str]
"""a is to b as c is to d"""
_COSINES = 2**25
"""computed at a time"""


@dataclass(frozen=True)
class AnalogyScore:
    """Questions of a section."""

    correct: int
    answered: int
    unknown: int
    """questions that have a word without a vector: they are not answered"""
    missing: tuple[str, ...]
    """those words"""

    @property
    def accuracy(self) -> float | None:
        """Share of the answered questions; None where there is none."""
        return self.correct / self.answered if self.answered else None


@dataclass(frozen=True)
class SimilarityScore:
    """Pairs of words."""

    spearman: float | None
    """rho of cosine and human score; None with fewer than two pairs"""
    pairs: int
    unknown: int
    """pairs that have a word without a vector: they do not count"""
    missing: tuple[str, ...]


def analogies(
    vectors: Tensor,
    words: Sequence[str],
    questions: Mapping[str, Sequence[Question]],
    method: Literal["add", "mul"] = "add",
    lowercase: bool = True,
) -> dict[str, AnalogyScore]:
    """How often d is found for "a is to b as c is to d":

    .. code-block:: text

        add    d = argmax_v  cos(v, b) - cos(v, a) + cos(v, c)                                    (3CosAdd)
        mul    d = argmax_v  s(v, b) s(v, c) / (s(v, a) + 0.001),    s = (cos + 1) / 2            (3CosMul)

    over all words v but a, b and c. A vector of zeros has the cosine 0 with every other.

    Args:
        vectors: (V, dim).
        words: V words, those that matter most first.
        questions: {section: questions}, such as `read_analogies` gives.
        method: "add" or "mul".
        lowercase: words are the same whose lower case is; the first of them has the vector.

    Returns:
        a score for each section, and "total".

    Raises:
        ValueError: there is not one word for each vector; a section is called "total"; the method is unknown.

    Source: Mikolov et al., NAACL 2013; Levy & Goldberg, CoNLL 2014 (3CosMul).
    """
    if method not in ("add", "mul"):
        raise ValueError(f"method is {method!r}; add or mul is needed")
    if "total" in questions:
        raise ValueError("a section is called 'total', which is the name of the sum; another name is needed")
    units, rows, name_of = _table(vectors, words, lowercase)
    scores: dict[str, AnalogyScore] = {}
    for section, asked in questions.items():
        asked = [tuple(name_of(word) for word in question) for question in asked]  # type: ignore[misc]
        missing = sorted({word for question in asked for word in question if word not in rows})
        known = [question for question in asked if all(word in rows for word in question)]
        correct = 0
        numbers = torch.tensor([[rows[w] for w in q] for q in known], dtype=torch.long, device=units.device).view(-1, 4)
        for part in numbers.split(max(1, _COSINES // max(1, len(units)))):
            correct += int((_answers(units, part[:, :3], method) == part[:, 3]).sum())
        scores[section] = AnalogyScore(correct, len(known), len(asked) - len(known), tuple(missing))
    every = list(scores.values())
    scores["total"] = AnalogyScore(
        sum(score.correct for score in every),
        sum(score.answered for score in every),
        sum(score.unknown for score in every),
        tuple(sorted({word for score in every for word in score.missing})),
    )
    return scores


def similarity(
    vectors: Tensor, words: Sequence[str], pairs: Sequence[tuple[str, str, float]], lowercase: bool = True
) -> SimilarityScore:
    """Spearman's rho of the cosines of pairs of words with human scores.

    Args:
        vectors: (V, dim).
        words: V words.
        pairs: (word, word, score), such as `read_similarities` gives.
        lowercase: as in `analogies`.

    Raises:
        ValueError: there is not one word for each vector; a score is not finite.

    Source: Finkelstein et al., WWW 2001 (WordSim-353).
    """
    units, rows, name_of = _table(vectors, words, lowercase)
    named = [(name_of(a), name_of(b), score) for a, b, score in pairs]
    missing = sorted({word for a, b, _ in named for word in (a, b) if word not in rows})
    known = [(rows[a], rows[b], score) for a, b, score in named if a in rows and b in rows]
    rho = None
    if len(known) > 1:
        first, second, scores = zip(*known, strict=True)
        cosines = (units[list(first)].double() * units[list(second)].double()).sum(-1)
        rho = float(spearman(cosines.cpu(), torch.tensor(scores, dtype=torch.float64)))
    return SimilarityScore(rho, len(known), len(pairs) - len(known), tuple(missing))


def read_analogies(path: str | os.PathLike[str]) -> dict[str, list[Question]]:
    """{section: questions} of a file such as questions-words.txt: a line `: section`, then four words a line. gensim's
    wheel holds it, in gensim/test/test_data.

    Raises:
        UserError: the file cannot be read, a line has not four words, or stands before the first section.
    """
    sections: dict[str, list[Question]] = {}
    section = None
    for number, line in _lines(path):
        if line.startswith(":"):
            section = line[1:].strip()
            sections.setdefault(section, [])
            continue
        found = line.split()
        if section is None:
            raise UserError(f"{path}, line {number}: a question before the first section; a line ': name' is needed")
        if len(found) != 4:
            raise UserError(f"{path}, line {number}: {len(found)} words; a question has 4")
        sections[section].append((found[0], found[1], found[2], found[3]))
    if not any(sections.values()):
        raise UserError(f"{path} has no question; at least one line of 4 words is needed")
    return sections


def read_similarities(path: str | os.PathLike[str]) -> list[tuple[str, str, float]]:
    """(word, word, score) of a file such as wordsim353.tsv: three columns with tabs between; lines that begin with #
    are remarks. gensim's wheel holds it, in gensim/test/test_data.

    Raises:
        UserError: the file cannot be read, or a line has not two words and a number.
    """
    pairs = []
    for number, line in _lines(path):
        if line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split("\t")]
        try:
            first, second, score = parts[0], parts[1], float(parts[2])
        except (IndexError, ValueError):
            raise UserError(
                f"{path}, line {number}: {line[:60]!r}; two words and a number with tabs between are needed"
            ) from None
        pairs.append((first, second, score))
    if not pairs:
        raise UserError(f"{path} has no pair; at least one line of two words and a number is needed")
    return pairs


def _lines(path: str | os.PathLike[str]) -> Iterable[tuple[int, str]]:
    """(number, line) of lines that are not blank."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a readable file is needed") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    return [(number, line.strip()) for number, line in enumerate(content.split("\n"), 1) if line.strip()]


def _table(
    vectors: Tensor, words: Sequence[str], lowercase: bool
) -> tuple[Tensor, dict[str, int], Callable[[str], str]]:
    """(vectors of length 1, one a word; their rows; what a word is called)."""
    if vectors.dim() != 2 or len(vectors) != len(words):
        raise ValueError(f"the vectors are {tuple(vectors.shape)} for {len(words)} words; (words, dim) is needed")
    name_of = str.lower if lowercase else str
    first: dict[str, int] = {}
    for row, word in enumerate(words):
        first.setdefault(name_of(word), row)
    kept = wide(vectors.detach()[list(first.values())])
    return F.normalize(kept, dim=-1), {word: row for row, word in enumerate(first)}, name_of


def _answers(units: Tensor, given: Tensor, method: str) -> Tensor:
    """Rows (Q,) that answer questions of the rows a, b, c: (Q, 3)."""
    a, b, c = units[given].unbind(1)
    if method == "add":
        scores = (b - a + c) @ units.T
    else:
        to_a, to_b, to_c = ((x @ units.T + 1) / 2 for x in (a, b, c))
        scores = to_b * to_c / (to_a + 0.001)
    return scores.scatter(1, given, float("-inf")).argmax(1)
