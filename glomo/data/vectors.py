"""Word vectors in files of one's own: lines of a word and its numbers, as GloVe's .txt and fastText's .vec are."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from glomo.data.files import PathLike
from glomo.errors import UserError


def read_vectors(path: PathLike, words: Collection[str]) -> dict[str, np.ndarray]:
    """The float32 vectors of some words; words that the file lacks are left out.

    Only their lines are parsed, so that a file of millions of words takes seconds and little memory. A first line that
    says how many words and numbers there are (.vec) is passed over. Of a word that stands twice the first line counts.

    Raises:
        UserError: the file cannot be read, or the line of one of the words holds something else than numbers.
    """
    path, wanted = Path(path).expanduser(), set(words)
    found: dict[str, np.ndarray] = {}
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, line in enumerate(file, 1):
                word, _, row = line.rstrip("\r\n").partition(" ")
                fields = row.split()
                header = number == 1 and len(fields) == 1
                if word in wanted and word not in found and not header:
                    found[word] = _numbers(path, number, word, fields)
    except OSError as error:
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"{path} cannot be read ({reason}); a file of word vectors is needed") from None
    return found


def _numbers(path: Path, line: int, word: str, fields: list[str]) -> np.ndarray:
    try:
        if fields:
            return np.array(fields, dtype=np.float32)
    except ValueError:
        pass
    shown = " ".join(fields)[:40]
    raise UserError(f"{path}, line {line}: behind {word!r} stands {shown!r}, where numbers are needed")
