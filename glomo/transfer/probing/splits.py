"""Which rows train a probe, which end its training, and which judge it: whole documents, never single units."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Rows of the features."""

    train: Tensor
    valid: Tensor
    test: Tensor


def seeded(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for each purpose: two that begin alike would draw alike, such as a split that puts all
    texts of one class into one part, because both are made of one permutation."""
    return torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:7], "big")
    )


def split_documents(
    documents: int | Sequence[Hashable] | Tensor, valid: float = 0.1, test: float = 0.1, seed: int = 0
) -> Split:
    """Rows by the document that they are of: all rows of a document are in the same part. (Units of one sentence in two
    parts would tell a probe more of the test set than it may know.)

    Args:
        documents: the document of each row, or a number of rows that are each a document of its own.
        valid, test: shares of the documents, at least one document each.
        seed: of the generator that draws them.

    Raises:
        ValueError: there are fewer than three documents; the shares leave nothing to train on.
    """
    if not (0 < valid < 1 and 0 < test < 1):
        raise ValueError(f"valid is {valid} and test {test}; shares above 0 and below 1 are needed")
    rows = range(documents) if isinstance(documents, int) else documents
    names: Sequence[Hashable] = rows.tolist() if isinstance(rows, Tensor) else rows
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    held = [max(1, round(share * len(number))) for share in (valid, test)]
    if len(number) <= sum(held):
        raise ValueError(
            f"there are {len(number)} documents, of which {held[0]} and {held[1]} are held out; at least one more is "
            "needed to train on"
        )
    order = torch.randperm(len(number), generator=seeded(seed, "split"))
    part = torch.zeros(len(number), dtype=torch.long)
    part[order[: held[0]]], part[order[held[0] : sum(held)]] = 1, 2
    of_rows = part[torch.tensor([number[name] for name in names])]
    return Split(*((of_rows == i).nonzero()[:, 0] for i in range(3)))


def check_split(split: Split, rows: int, documents: Sequence[Hashable] | Tensor | None = None) -> None:
    """Raises ValueError where a part is empty, a row is in two parts or not there, or a document is in two parts."""
    sizes = [len(part) for part in split]
    if min(sizes) < 1:
        raise ValueError(f"the split has {sizes[0]}, {sizes[1]} and {sizes[2]} rows; at least one each is needed")
    everything = torch.cat([torch.as_tensor(part).cpu() for part in split])
    least, most = int(everything.min()), int(everything.max())
    if least < 0 or most >= rows:
        raise ValueError(f"the split names rows from {least} to {most}; from 0 to {rows - 1} are there")
    if len(everything.unique()) != len(everything):
        raise ValueError("the split names a row twice; every row is in one part at most")
    if documents is None:
        return
    names = documents.tolist() if isinstance(documents, Tensor) else documents
    parts: dict[Hashable, int] = {}
    for place, part in enumerate(split):
        for row in part.tolist():
            if parts.setdefault(names[row], place) != place:
                raise ValueError(f"the document {names[row]!r} is in two parts of the split; every one is in one")
