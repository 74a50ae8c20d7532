"""Graphs that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glomo.errors import UserError

if TYPE_CHECKING:
    from glomo.nn import FrozenGraph

FOLDER = Path(__file__).resolve().parent


def pretrained_names() -> list[str]:
    """The names that `load_pretrained` knows."""
    return sorted(path.parent.name for path in FOLDER.glob("*/meta.json"))


def load_pretrained(name: str) -> FrozenGraph:
    """A graph that comes with the package, frozen, with its vocabulary; nothing is downloaded.

    ``graph-en-small``: English words. Its card, ``glomo/pretrained/graph-en-small/README.md``, says what it was learned
    from and how, under which licences, and what it was seen to help and not to help.

    Example::

        graph = glomo.load_pretrained("graph-en-small")
        units, lengths = glomo.data.pad([graph.vocabulary.encode("Who built the first bridge?")])
        forward, backward = graph.queries_keys(units, lengths)

    Raises UserError for a name that is not there, and for files that were cut or changed.
    """
    from glomo.training.config import nearest
    from glomo.training.models import load_graph

    if name not in pretrained_names():
        raise UserError(f"there is no graph {name!r} in this package{nearest(name, pretrained_names())}")
    return load_graph(FOLDER / name)
