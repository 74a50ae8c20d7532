"""Pictures of graphs over a sentence. matplotlib is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

DIRECTIONS = ("reads what came before", "reads what comes after")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # files only: no window system is needed
    from matplotlib import pyplot

    return pyplot


def heat_maps(graphs: Tensor, num_heads: int, words: Sequence[str], path: Path) -> None:
    """One map per direction, layer and head: row = target, column = source, darker = larger weight.

    Args:
        graphs: (2, N, T, T), N = layers * heads, as `GraphPredictor.graphs` gives them for one sentence.
        num_heads: heads of a layer.
        words: T labels.
        path: where the PNG goes.
    """
    plt = _pyplot()
    layers = graphs.size(1) // num_heads
    side = max(1.6, 0.17 * len(words))
    rows = 2 * layers
    figure, axes = plt.subplots(
        rows, num_heads, figsize=(side * num_heads + 1.2, side * rows + 0.8), squeeze=False, layout="constrained"
    )
    for row in range(rows):
        direction, layer = divmod(row, layers)
        for head in range(num_heads):
            axis = axes[row][head]
            axis.imshow(graphs[direction, layer * num_heads + head].numpy(), cmap="magma_r", vmin=0, vmax=1)
            axis.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
            axis.set_xticks(range(len(words)), words if row == rows - 1 else [], rotation=90, fontsize=7)
            axis.set_yticks(range(len(words)), words if head == 0 else [], fontsize=7)
            axis.tick_params(length=0)
        axes[row][0].set_ylabel(f"target ({DIRECTIONS[direction]})", fontsize=8)
    figure.suptitle("weight with which a target (row) reads a source (column)", fontsize=9)
    _save(figure, path)


def arcs(graphs: Tensor, num_heads: int, words: Sequence[str], path: Path, smallest: float = 0.15) -> None:
    """Per layer the words in a line, and an arc from every source to the target that reads it: above the line those to
    the left, below it those to the right; colour = head, thickness = weight. Weights below `smallest` are left out."""
    plt = _pyplot()
    layers = graphs.size(1) // num_heads
    width = max(6.0, 0.55 * sum(len(w) + 2 for w in words) / 3)
    figure, axes = plt.subplots(layers, 1, figsize=(width, 3.2 * layers), squeeze=False, layout="constrained")
    colours = plt.get_cmap("tab10").colors
    for layer in range(layers):
        axis = axes[layer][0]
        highest = 1.0
        for direction, head, target, source in _links(graphs, layer, num_heads, smallest):
            weight = float(graphs[direction, layer * num_heads + head, target, source])
            middle, radius = (target + source) / 2, abs(target - source) / 2
            height = (0.25 + 0.75 * radius) * (1 if direction == 0 else -1)
            highest = max(highest, abs(height))
            x = [middle - radius * _cos(i) for i in range(33)]
            y = [0.35 * (1 if direction == 0 else -1) + height * _sin(i) for i in range(33)]
            axis.plot(x, y, color=colours[head % 10], linewidth=0.5 + 3 * weight, alpha=0.25 + 0.7 * weight)
        for position, word in enumerate(words):
            axis.text(position, 0, word, ha="center", va="center", fontsize=9)
        axis.set_xlim(-0.8, len(words) - 0.2)
        axis.set_ylim(-highest - 0.6, highest + 0.6)
        axis.axis("off")
        axis.set_title(f"layer {layer + 1}: above, a word reads earlier ones; below, later ones", fontsize=9)
    handles = [plt.Line2D([], [], color=colours[h % 10], linewidth=3, label=f"head {h + 1}") for h in range(num_heads)]
    figure.legend(handles=handles, ncols=num_heads, fontsize=8, frameon=False, loc="outside lower center")
    _save(figure, path)


def _links(graphs: Tensor, layer: int, num_heads: int, smallest: float) -> list[tuple[int, int, int, int]]:
    part = graphs[:, layer * num_heads : (layer + 1) * num_heads]
    return [tuple(index) for index in (part >= smallest).nonzero().tolist()]


def accuracies(results: dict[str, Any], path: Path) -> None:
    """Accuracy of every run of a `compare` result as points, with the mean and the standard deviation per graph."""
    plt = _pyplot()
    rows = results["graphs"]  # {graph: {"mean", "std", ...}}
    figure, axis = plt.subplots(figsize=(1.2 * len(rows) + 1.5, 3.4), layout="constrained")
    for x, (graph, row) in enumerate(rows.items()):
        values = [100 * run["accuracy"] for run in results["runs"] if run["graph"] == graph]
        spread = 100 * (row["std"] or 0.0)
        axis.errorbar(x, 100 * row["mean"], yerr=spread, fmt="_", color="black", markersize=24, capsize=6)
        axis.plot([x] * len(values), values, "o", alpha=0.5)
    axis.set_xticks(range(len(rows)), list(rows))
    axis.set_ylabel("test accuracy, %")
    axis.set_title(f"{results['task']}: each point a seed, bar = mean ± std", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    _save(figure, path)


def _cos(i: int) -> float:
    from math import cos, pi

    return cos(pi * i / 32)


def _sin(i: int) -> float:
    from math import pi, sin

    return sin(pi * i / 32)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
