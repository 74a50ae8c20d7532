"""Words and their pronunciations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch

BLANK = 0


class Lexicon:
    """Words and their pronunciations: word -> one or several sequences of phonemes.

    A word needs no example, only an entry. Words with equal pronunciations get equal scores; which of them is meant is
    for a language model to say.

    Args:
        entries: {word: [[phoneme, ...], ...]}, in the order of the scores' columns.
        phonemes: what the recogniser knows, in the order of its outputs from the second on (the first is the blank of
            CTC). None: the entries' phonemes, sorted. Give a recogniser's own to a lexicon of other words.

    Raises:
        ValueError: no word, a word without a pronunciation, one without a phoneme, a phoneme that the recogniser does
            not know, or one that it has twice.
        TypeError: a pronunciation is a text.
    """

    def __init__(self, entries: Mapping[str, Sequence[Sequence[str]]], phonemes: Sequence[str] | None = None) -> None:
        if not entries:
            raise ValueError("the lexicon has no word; at least 1 is needed")
        pairs = [(place, one) for place, word in enumerate(entries) for one in _checked(word, entries[word])]
        used = {phoneme for _, one in pairs for phoneme in one}
        self.words: list[str] = list(entries)
        self.phonemes: list[str] = sorted(used) if phonemes is None else list(phonemes)
        ids = {phoneme: place for place, phoneme in enumerate(self.phonemes, BLANK + 1)}
        if len(ids) != len(self.phonemes):
            twice = next(p for place, p in enumerate(self.phonemes) if p in self.phonemes[:place])
            raise ValueError(f"the phoneme {twice!r} stands twice in phonemes; once is needed")
        unknown = next(((place, phoneme) for place, one in pairs for phoneme in one if phoneme not in ids), None)
        if unknown:
            word, known = self.words[unknown[0]], " ".join(self.phonemes)
            raise ValueError(f"the word {word!r} has the phoneme {unknown[1]!r}; the recogniser knows {known}")
        rows = [torch.tensor([ids[phoneme] for phoneme in one]) for _, one in pairs]
        self.targets = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=BLANK)
        """(P, longest): ids of all pronunciations"""
        self.lengths = torch.tensor([len(row) for row in rows])
        """(P,)"""
        self.owners = torch.tensor([place for place, _ in pairs])
        """(P,): place of each pronunciation's word"""

    @classmethod
    def parse(cls, text: str, stress: bool = False, phonemes: Sequence[str] | None = None) -> Lexicon:
        """A lexicon in the notation of CMUdict, a word and its phonemes in each line:

        .. code-block:: text

            ;;; a comment
            ZERO  Z IH1 R OW0
            ZERO(1)  Z IY1 R OW0

        Words get lower case, and ZERO(1) is one more pronunciation of zero.

        Args:
            text: the lines.
            stress: keep the digits of the vowels (IH1); else they are dropped (IH).
            phonemes: see `Lexicon`.

        Raises:
            ValueError: a line has no phoneme (the message says which), or as for `Lexicon`.
        """
        entries: dict[str, list[list[str]]] = {}
        for word, sounds in _lines(text):
            entries.setdefault(word, []).append(sounds if stress else [sound.rstrip("012") for sound in sounds])
        return cls(entries, phonemes)


def _lines(text: str) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(text.splitlines(), 1):
        word, *sounds = re.sub(r"\s#.*", "", line).split() or [""]
        if not word or word.startswith(";;;"):
            continue
        if not sounds:
            raise ValueError(f"line {number} of the lexicon is {line!r}; a word and its phonemes are needed")
        yield re.sub(r"\(\d+\)$", "", word).lower(), sounds


def _checked(word: str, pronunciations: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Each pronunciation once."""
    if isinstance(pronunciations, str) or any(isinstance(one, str) for one in pronunciations):
        raise TypeError(f"the pronunciations of {word!r} are {pronunciations!r}; a sequence of sequences is needed")
    if not pronunciations or not all(pronunciations):
        raise ValueError(f"the word {word!r} has the pronunciations {pronunciations!r}; at least 1 phoneme is needed")
    return list(dict.fromkeys(map(tuple, pronunciations)))
