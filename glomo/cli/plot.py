"""``glomo plot GRAPH --text "..."``: pictures of a graph over a sentence."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from glomo.errors import UserError

MAX_UNITS = 60
USAGE = f"""usage: glomo plot GRAPH --text "A sentence." [--out DIR]

GRAPH is the folder of a `glomo pretrain` run, or one of its checkpoints.
DIR (the current folder unless given) gets heat-maps.png (a map per direction, layer and head) and arcs.png (the
links over the words). A sentence may have up to {MAX_UNITS} units."""


def main(argv: Sequence[str]) -> int:
    """Draw a graph."""
    from glomo.training.config import split_arguments

    arguments = split_arguments(argv)
    options = dict(arguments.options)
    if "help" in options:
        print(USAGE)
        return 0
    text, out = options.pop("text", None), Path(options.pop("out", "."))
    if options:
        raise UserError(f"`glomo plot` has no option --{next(iter(options))}; it knows --text and --out")
    if len(arguments.positional) != 1 or not text:
        raise UserError('`glomo plot` needs a graph and a sentence: glomo plot DIR --text "A sentence."')
    for path in draw(Path(arguments.positional[0]), text, out):
        print(path)
    return 0


def draw(folder: Path, text: str, out: Path) -> list[Path]:
    """The pictures of the graph in `folder` over `text`; returns where they are."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib, which is not installed: pip install 'glomo[plot]'")
    import torch

    from glomo.plots import arcs, heat_maps
    from glomo.training.models import load_graph

    graph = load_graph(folder)
    ids, words = graph.vocabulary.encode(text), graph.vocabulary.tokens(text)
    if not 2 <= len(ids) <= MAX_UNITS:
        raise UserError(f"the text has {len(ids)} unit{'s' * (len(ids) != 1)}; a picture needs 2 to {MAX_UNITS}")
    with torch.no_grad():
        graphs = graph.graph_predictor.graphs(torch.tensor([ids]), torch.tensor([len(ids)]))[0]
    paths = [out / "heat-maps.png", out / "arcs.png"]
    for picture, path in zip((heat_maps, arcs), paths, strict=True):
        picture(graphs, graph.num_heads, words, path)
    return paths
