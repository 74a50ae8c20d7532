"""Labels as word vectors: a class is where its name is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.transfer.zero_shot.tables import check_distinct


def label_vectors(names: Sequence[str], vectors: Mapping[str, Any]) -> Tensor:
    """Vectors of length 1 for the names of classes, (C, dim), fp32:

    .. code-block:: text

        v(name) / ||v(name)||,     of a name of several words: v = the mean of the words' vectors

    A name is looked up as it is and in lower case, whole first, then word by word; words end at spaces, "_", "-", "/".

    Args:
        names: C names of classes, no two of them the same.
        vectors: word -> vector, such as `dict(zip(*glomo.data.catalogue.load_vectors("glove-50d")))`.

    Raises:
        ValueError: no name; a name, or a word of it, has no vector; vectors have different lengths; a mean has no
            direction; two names have one vector, so that nothing could tell them apart.

    Source: Frome et al., NIPS 2013; Norouzi et al., ICLR 2014.
    """
    if not len(names):
        raise ValueError("there is no name of a class; at least 1 is needed")
    rows = [_vector(name, vectors) for name in names]
    sizes = {len(row): name for row, name in zip(rows, names, strict=True)}
    if len(sizes) > 1:
        given = " and ".join(f"{size} ({name!r})" for size, name in sizes.items())
        raise ValueError(f"the labels' vectors have {given} numbers; all need as many")
    table = torch.stack(rows)
    lengths = table.norm(dim=1)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        name = next(name for name, length in zip(names, lengths.tolist(), strict=True) if not 0 < length < float("inf"))
        raise ValueError(
            f"the vector of the label {name!r} has no direction; finite numbers that are not all 0 are needed"
        )
    unit = F.normalize(table, dim=1).float()
    check_distinct(names, unit, "vector")
    return unit


def words_of(name: str) -> list[str]:
    """The words of a name: they end at spaces, "_", "-", "/"."""
    return [word for word in re.split(r"[\s_\-/]+", name) if word]


def _vector(name: str, vectors: Mapping[str, Any]) -> Tensor:
    whole = _found(name, vectors)
    if whole is not None:
        return whole
    words = words_of(name)
    found = {word: _found(word, vectors) for word in words}
    missing = [word for word, row in found.items() if row is None]
    if missing or not words:
        looked_up = ", ".join(repr(word) for word in dict.fromkeys([name, *words]))
        raise ValueError(
            f"the label {name!r} has no vector: looked up were {looked_up}, without a vector are "
            f"{', '.join(map(repr, missing or [name]))}; give it a name of words that have one"
        )
    rows = [row for word in words if (row := found[word]) is not None]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"the words of the label {name!r} have vectors of {', '.join(str(len(row)) for row in rows)} numbers; all "
            "need as many"
        )
    return torch.stack(rows).mean(0)


def _found(word: str, vectors: Mapping[str, Any]) -> Tensor | None:
    key = next((key for key in (word, word.lower()) if key in vectors), None)
    return None if key is None else torch.as_tensor(vectors[key], dtype=torch.float64).flatten()
