"""``glomo plot GRAPH --text "..."``: pictures of a graph over a sentence, or over the pixels of images."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from glomo.errors import UserError

MAX_UNITS = 60
IMAGES = 32
USAGE = f"""usage: glomo plot GRAPH --text "A sentence." [--out DIR]
       glomo plot GRAPH --images NAME [--out DIR]

GRAPH is the folder of a `glomo pretrain` run, one of its checkpoints, or a graph that comes with the package.
DIR (the current folder unless given) gets heat-maps.png (a map per direction, layer and head) and arcs.png (the
links over the words). A sentence may have up to {MAX_UNITS} units. A graph of pixels is drawn as its mean over
{IMAGES} test images of the data set NAME (`glomo data ls`): offsets.png."""


def main(argv: Sequence[str]) -> int:
    """Draw a graph."""
    from glomo.training.config import split_arguments

    arguments = split_arguments(argv)
    options = dict(arguments.options)
    if "help" in options:
        print(USAGE)
        return 0
    text, images, out = options.pop("text", None), options.pop("images", None), Path(options.pop("out", "."))
    if options:
        raise UserError(f"`glomo plot` has no option --{next(iter(options))}; it knows --text, --images and --out")
    if len(arguments.positional) != 1 or not (text or images):
        raise UserError('`glomo plot` needs a graph and a sentence: glomo plot DIR --text "A sentence."')
    folder = Path(arguments.positional[0])
    for path in draw_offsets(folder, images, out) if images else draw(folder, str(text), out):
        print(path)
    return 0


def draw_offsets(folder: Path, name: str, out: Path) -> list[Path]:
    """The picture of a graph of pixels, over test images of a data set; returns where it is."""
    _needs_matplotlib()
    import math

    import torch

    from glomo.data import Pixels
    from glomo.plots import offsets
    from glomo.training.models import load_graph
    from glomo.training.targets.images import PixelRows, check_values, images_of

    graph = load_graph(folder)
    if not isinstance(graph.vocabulary, Pixels):
        raise UserError(f"{folder} is a graph of words; --images is for one of pixels")
    check_values(name, graph.vocabulary)
    rows = PixelRows(graph.vocabulary.sequences(images_of(name, "test")[0][:IMAGES]))
    graphs = torch.zeros(())
    with torch.no_grad():
        for index in range(len(rows.units)):  # one at a time: all of them in full would be gigabytes
            graphs = graphs + graph.graph_predictor.graphs(*rows.batch([index]))[0] / len(rows.units)
    path = out / "offsets.png"
    offsets(graphs, graph.num_heads, math.isqrt(graphs.size(-1)), path)
    return [path]


def _needs_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib, which is not installed: pip install 'glomo[plot]'")


def draw(folder: Path, text: str, out: Path) -> list[Path]:
    """The pictures of the graph in `folder` over `text`; returns where they are."""
    _needs_matplotlib()
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
