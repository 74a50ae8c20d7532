"""Word-level vocabulary: a documented rule that cuts text into words, and a table from words to ids.

The vocabulary is part of what a pre-trained graph *is*: it is saved with the graph and used again, unchanged, on the
target task.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from glomo.errors import UserError

PAD, UNK = "<pad>", "<unk>"

# ASCII punctuation, and the punctuation and signs of Latin-1, the general, currency and CJK blocks. Words are all the
# rest: said this way round, combining marks stay inside their words, which `\w` would cut.
_SIGNS = (
    r"!-/:-@\[-`{-~\u00a1-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7"
    r"\u2010-\u206f\u20a0-\u20cf\u3000-\u3020\uff01-\uff0f"
)
_WORD = rf"[^\s{_SIGNS}]"
_TOKEN = re.compile(
    rf"{_WORD}+(?:(?<=\d)[.,:](?=\d){_WORD}+)*"  # a word; a number keeps its inner separators: 1,000.5 or 10:30
    rf"|'(?:s|t|re|ve|ll|d|m)(?!{_WORD})"  # the ending of a contraction: it 's, didn 't
    rf"|[^\s]",  # any other sign alone
    re.IGNORECASE,
)
_DIGIT = re.compile(r"\d")


class AnyVocabulary(Protocol):
    """What :class:`Vocabulary` (words) and :class:`glomo.data.Subwords` (pieces of words) have in common."""

    pad_id: int
    unk_id: int

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def tokens(self, text: str) -> list[str]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def units(self) -> list[str]: ...

    def to_dict(self) -> dict[str, Any]: ...

    @property
    def fingerprint(self) -> str: ...


def split_words(text: str, lowercase: bool = True) -> list[str]:
    """Cut text into words and signs.

    The rule: Unicode NFC, the typographic apostrophe made plain, lower case if asked. A word is a run of characters
    that are neither white space nor punctuation; a number keeps the points, commas and colons between its digits; the
    endings 's 't 're 've 'll 'd 'm stand alone with their apostrophe; every other sign is a token of its own.

    >>> split_words("It didn't cost $1,000.50 -- state-of-the-art?")
    ['it', 'didn', "'t", 'cost', '$', '1,000.50', '-', '-', 'state', '-', 'of', '-', 'the', '-', 'art', '?']
    """
    text = unicodedata.normalize("NFC", text).replace("\u2019", "'")
    return _TOKEN.findall(text.lower() if lowercase else text)


class _Ids(dict[str, int]):
    """Word to id; a missing word that holds a digit has the id of the digit mark, any other the id of its bucket, or of
    unknown words where there is no bucket."""

    digit_id: int | None = None
    first_bucket = 1
    buckets = 1

    def __missing__(self, word: str) -> int:
        if self.digit_id is not None and _DIGIT.search(word):
            return self.digit_id
        return self.first_bucket + zlib.crc32(word.encode("utf-8", "surrogatepass")) % self.buckets


class Vocabulary:
    """Words and their ids: 0 is padding, 1 is every unknown word, then ``words`` in order.

    Args:
        words: the known words, without the two reserved ones.
        lowercase: text is made lower case before it is looked up.
        digits: a mark such as "N" that stands for every token with a digit in it (as in the released GLoMo code), or
        None to keep such tokens.
        buckets: so many ids more, behind the words, share the unknown words out by their CRC-32. What such an id means
        is little, but a rare name keeps its own within a text, where it can be found again. 0: all are <unk>.

    Attributes:
        words: all entries by id, ``["<pad>", "<unk>", ..., "<unk-0>", "<unk-1>", ...]``.
    """

    pad_id = 0
    unk_id = 1

    def __init__(self, words: Sequence[str], lowercase: bool = True, digits: str | None = "N", buckets: int = 0):
        if buckets < 0:
            raise UserError(f"a vocabulary of {buckets} buckets for unknown words was asked for; 0 or more are needed")
        self.words = [PAD, UNK, *words, *(f"<unk-{number}>" for number in range(buckets))]
        self.lowercase = lowercase
        self.digits = digits
        self.buckets = buckets
        self._ids = _Ids((word, i) for i, word in enumerate(self.words))
        if len(self._ids) != len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise UserError(f"a vocabulary holds the word {twice!r} twice; every word must be there once")
        if digits is not None:
            self._ids.digit_id = self._ids.get(digits, self.unk_id)
        if buckets:
            self._ids.first_bucket, self._ids.buckets = len(self.words) - buckets, buckets
        self.fingerprint: str = vocabulary_fingerprint(self.to_dict())

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        max_size: int,
        min_count: int = 1,
        lowercase: bool = True,
        digits: str | None = "N",
        buckets: int = 0,
    ) -> Vocabulary:
        """Count the words of the texts and keep the most frequent, ties in the order of the words themselves.

        Args:
            max_size: the most entries, the two reserved ones included and the buckets left out.
            min_count: rarer words are left out.

        Raises:
            UserError: no room for a single word, or no word in the texts that is frequent enough.
        """
        if isinstance(texts, str):
            raise TypeError("Vocabulary.build needs a list of texts, not one string")
        if max_size < 3:
            raise UserError(
                f"a vocabulary of at most {max_size} entries has no room for a word beside padding and unknown; at "
                "least 3 are needed"
            )
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(split_words(text, lowercase))
        if digits is not None:
            for word in [word for word in counts if _DIGIT.search(word)]:
                counts[digits] += counts.pop(word)
        frequent = sorted(
            (word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word)
        )
        if not frequent:
            raise UserError(
                f"the texts hold {len(counts)} different words, none of them {min_count} times or more; a vocabulary "
                "needs at least one"
            )
        return cls(frequent[: max_size - 2], lowercase, digits, buckets)

    def __len__(self) -> int:
        return len(self.words)

    def tokens(self, text: str) -> list[str]:
        """The words of the text, as they are read: one per id of :meth:`encode`, unknown words and numbers included."""
        return split_words(text, self.lowercase)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where in the text each of its :meth:`tokens` stands: the characters from ``start`` to before ``end``.

        Raises UserError for a text that has other words after Unicode's normalisation (NFC) than before it.
        """
        found = [match.span() for match in _TOKEN.finditer(text.replace("\u2019", "'"))]
        if len(found) != len(self.tokens(text)):
            raise UserError("the text is not in Unicode's normal form (NFC), and the places of its words are unclear")
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of the words of the text."""
        ids = self._ids
        return [ids[word] for word in split_words(text, self.lowercase)]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of the ids, with spaces between."""
        return " ".join(self.words[i] for i in ids)

    def units(self) -> list[str]:
        """The words by id."""
        return self.words

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON-able values; :meth:`from_dict` restores it."""
        saved = {"kind": "words", "lowercase": self.lowercase, "digits": self.digits}
        saved |= {"buckets": self.buckets} if self.buckets else {}
        return {**saved, "words": self.words[2 : len(self.words) - self.buckets]}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Vocabulary:
        """Restore a vocabulary from :meth:`to_dict`.

        Raises:
            UserError: the saved form is not one of a word vocabulary.
        """
        words, lowercase, digits = saved.get("words"), saved.get("lowercase"), saved.get("digits")
        if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
            raise UserError(
                "a saved vocabulary has no list of words under 'words'; it is damaged or not from this program"
            )
        if not isinstance(lowercase, bool) or not (digits is None or isinstance(digits, str)):
            raise UserError(
                f"a saved vocabulary has lowercase={lowercase!r} and digits={digits!r}; a boolean and a string or "
                "null are needed"
            )
        buckets = saved.get("buckets", 0)
        if not isinstance(buckets, int) or isinstance(buckets, bool) or not 0 <= buckets < 2**31:
            raise UserError(f"a saved vocabulary has buckets={buckets!r}; a whole number is needed")
        return cls(words, lowercase, digits, buckets)


def vocabulary_fingerprint(saved: dict[str, Any]) -> str:
    """The sha256 (hex) of the canonical JSON of a vocabulary's ``to_dict()``."""
    canonical = json.dumps(saved, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_same_vocabulary(needed: AnyVocabulary, found: AnyVocabulary, what: str) -> None:
    """Raise a UserError that names both fingerprints and both sizes unless the vocabularies are the same.

    Args:
        what: the thing that carries ``found``, to begin the sentence with.
    """
    if needed.fingerprint != found.fingerprint:
        raise UserError(
            f"{what} has the vocabulary {found.fingerprint[:12]} of {len(found)} entries, "
            f"but {needed.fingerprint[:12]} of {len(needed)} entries is needed: the ids of one mean nothing in the "
            "other"
        )
