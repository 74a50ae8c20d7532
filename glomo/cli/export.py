"""``glomo export RUN FOLDER``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glomo.errors import UserError

USAGE = """usage: glomo export RUN FOLDER

writes the graph of a `glomo pretrain` run (its best/ if there is one, else its final/) to FOLDER: weights of the graph
predictor alone, in half precision, with settings and vocabulary. FOLDER serves as --graph.path, and for
glomo.training.models.load_graph."""


def main(argv: Sequence[str]) -> int:
    """Write a graph without what trained it."""
    from glomo.training.config import split_arguments

    arguments = split_arguments(argv)
    if "help" in arguments.options:
        print(USAGE)
        return 0
    if arguments.options or len(arguments.positional) != 2:
        raise UserError("`glomo export` needs two words behind it, RUN and FOLDER")
    from glomo.training.models import export_graph

    run, folder = arguments.positional
    print(f"{export_graph(run, Path(folder)) / 1e6:.1f} MB in {folder}")
    return 0
