"""What the tables of classes have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor


def check_distinct(names: Sequence[str], rows: Tensor, what: str) -> None:
    """Raises ValueError for a name that stands twice, or two names with equal rows."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two classes are called {twice[0]!r}; each needs a name of its own")
    first: dict[tuple[float, ...], str] = {}
    for name, row in zip(names, rows.tolist(), strict=True):
        other = first.setdefault(tuple(row), name)
        if other != name:
            raise ValueError(
                f"the classes {other!r} and {name!r} have the same {what}; they need different ones to be told apart"
            )
