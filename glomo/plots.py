"""Pictures: graphs over a sentence, results beside each other. matplotlib is imported where it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
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
        graphs: (directions, N, T, T), N = layers * heads: 2 directions as `GraphPredictor.graphs` gives them for one
            sentence, or 1 for weights of all units.
        num_heads: heads of a layer.
        words: T labels.
        path: where the PNG goes.
    """
    plt = _pyplot()
    layers = graphs.size(1) // num_heads
    side = max(1.6, 0.17 * len(words))
    rows = len(graphs) * layers
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
        axes[row][0].set_ylabel("target" if len(graphs) == 1 else f"target ({DIRECTIONS[direction]})", fontsize=8)
    figure.suptitle("weight with which a target (row) reads a source (column)", fontsize=9)
    _save(figure, path)


def offsets(graphs: Tensor, num_heads: int, side: int, path: Path) -> None:
    """Where pixels read: a map per direction, layer and head of the mean weight by rows and columns from the target,
    which is the cross in the middle; darker = larger weight.

    Args:
        graphs: (directions, N, T, T), the mean over images of `side` x `side` = T pixels.
        num_heads: heads of a layer.
        path: where the PNG goes.
    """
    plt = _pyplot()
    place = torch.arange(side * side)
    rows, columns = place // side, place % side
    row = (rows - rows[:, None]).flatten() + side - 1  # of the source, from the target
    column = (columns - columns[:, None]).flatten() + side - 1
    width = 2 * side - 1
    count, layers = len(graphs) * graphs.size(1) // num_heads, graphs.size(1) // num_heads
    figure, axes = plt.subplots(
        count, num_heads, figsize=(1.7 * num_heads + 0.8, 1.7 * count + 0.6), squeeze=False, layout="constrained"
    )
    for index in range(count):
        direction, layer = divmod(index, layers)
        for head in range(num_heads):
            weights = graphs[direction, layer * num_heads + head].flatten()
            total = torch.zeros(width * width).index_add(0, row * width + column, weights)
            axis = axes[index][head]
            axis.imshow((total / total.sum().clamp(min=1e-12)).view(width, width).sqrt().numpy(), cmap="magma_r")
            axis.plot([side - 1], [side - 1], "+", color="tab:blue", markersize=8)
            axis.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[index][0].set_ylabel(DIRECTIONS[direction], fontsize=8)
    figure.suptitle(
        "where a pixel (the cross) reads, mean over images; side by side = columns, up and down = rows", fontsize=9
    )
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
        values = [100 * run["figures"][results["measure"]] for run in results["runs"] if run["graph"] == graph]
        spread = 100 * (row["std"] or 0.0)
        axis.errorbar(x, 100 * row["mean"], yerr=spread, fmt="_", color="black", markersize=24, capsize=6)
        axis.plot([x] * len(values), values, "o", alpha=0.5)
    axis.set_xticks(range(len(rows)), list(rows))
    axis.set_ylabel(f"{results['measure'].replace('_', ' ')}, %")
    axis.set_title(f"{results['task']}: each point a seed, bar = mean ± std", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    _save(figure, path)


def study(results: Mapping[str, Any], path: Path) -> None:
    """A panel a task: each variant's paired difference to the first one, ± 2 standard errors, and every seed's."""
    plt = _pyplot()
    tasks = results["tasks"]
    size = max(len(found["rows"]) for found in tasks.values())
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(1.5 + 3.6 * len(tasks), 1.2 + 0.34 * size), layout="constrained", squeeze=False
    )
    for axis, (task, found) in zip(axes[0], tasks.items(), strict=True):
        names = [row["variant"] for row in found["rows"]]
        value = {
            (run["variant"], run["seed"]): 100 * run["figures"][found["measure"]]
            for run in results["runs"]
            if run["task"] == task
        }
        for place, row in enumerate(found["rows"][1:], 1):
            points = [v - value[names[0], seed] for (name, seed), v in value.items() if name == row["variant"]]
            axis.plot(points, [place] * len(points), "o", color="grey", alpha=0.4, markersize=4)
            error = 200 * (row["difference"]["error"] or 0.0)
            axis.errorbar(100 * row["difference"]["mean"], place, xerr=error, fmt="|", color="black", capsize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(1, len(names)), [_plain(name) for name in names[1:]], fontsize=8)
        axis.set_ylim(max(len(names), 2) - 0.5, 0.5)
        axis.set_xlabel(f"{found['measure'].replace('_', ' ')}, points against {_plain(names[0])}", fontsize=8)
        axis.set_title(f"{_plain(task)} (bar: ± 2 standard errors)", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def trade_off(results: Mapping[str, Any], path: Path) -> None:
    """The error against seconds of training, one point a way (a bar = ± std), as large as its trainable share."""
    rows = [row for row in results["ways"] if row["labels"] == results["ways"][-1]["labels"]]
    scale = results["scale"]
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for row in rows:
        size = 30 + 170 * row["trainable"] / row["parameters"]
        spread, error = scale * (row["std"] or 0.0), scale * row["error"]
        axis.errorbar(row["seconds"], error, yerr=spread, color="grey", alpha=0.6, zorder=0)
        axis.scatter(row["seconds"], error, s=size, label=f"{_plain(row['way'])}: {row['trainable']:,} learn")
    axis.set_xlabel("seconds of training")
    axis.set_ylabel(results["measure"])
    axis.set_title(f"{results['task']}: area = share of the parameters that learns", fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    axis.grid(alpha=0.3)
    _save(figure, path)


def error_curves(curves: Mapping[str, Mapping[int, Sequence[float]]], path: Path, scale: float = 100.0) -> None:
    """Validation error in %, or with scale 1 the loss, while training, the mean of the seeds with their range; nothing
    without validations."""
    if not curves:
        return
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for way, points in curves.items():
        steps = sorted(points)
        means = [scale * sum(points[step]) / len(points[step]) for step in steps]
        (line,) = axis.plot(steps, means, marker=".", label=_plain(way))
        low, high = ([scale * pick(points[step]) for step in steps] for pick in (min, max))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.12)
    axis.set_xlabel("step")
    axis.set_ylabel("validation error, %" if scale > 1 else "validation loss")
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    axis.grid(alpha=0.3)
    _save(figure, path)


def low_shot(results: Mapping[str, Any], path: Path) -> None:
    """Test error against the number of labelled examples; nothing for a single number."""
    ways: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["ways"]:
        ways.setdefault(row["way"], []).append(row)
    if max(map(len, ways.values())) < 2:
        return
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for way, rows in ways.items():
        rows = sorted(rows, key=lambda row: row["examples"])
        spreads = [100 * (row["std"] or 0.0) for row in rows]
        xs, ys = [row["examples"] for row in rows], [100 * row["error"] for row in rows]
        axis.errorbar(xs, ys, yerr=spreads, marker="o", capsize=3, label=_plain(way))
    axis.set_xscale("log")
    axis.set_xlabel("labelled examples to train on")
    axis.set_ylabel("test error, %")
    axis.set_title(results["task"], fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    axis.grid(alpha=0.3)
    _save(figure, path)


def rate_test(found: Mapping[str, Any], path: Path) -> None:
    """The loss of a learning-rate range test against the rate, and its suggestion."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axis.plot(found["rates"], found["losses"], color="grey", alpha=0.4, label="loss of each step")
    axis.plot(found["rates"], found["smooth"], label="smoothed")
    if found["suggestion"] is not None:
        axis.axvline(
            found["suggestion"],
            linestyle="--",
            color="black",
            label=f"a tenth of the lowest's: {found['suggestion']:.2g}",
        )
    axis.set_xscale("log")
    axis.set_xlabel("learning rate of the last layer group")
    axis.set_ylabel("loss")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    _save(figure, path)


def domain_map(before: Tensor, after: Tensor, domains: Sequence[str], classes: Sequence[str], path: Path) -> None:
    """Two panels, features before and after an adaptation as points: colour = domain, marker = class (the eleventh has
    the first one's again).

    Args:
        before: (N, 2), of `glomo.transfer.domains.project`.
        after: (N, 2).
        domains: N names.
        classes: N names.
        path: where the PNG goes.
    """
    if not len(before) == len(after) == len(domains) == len(classes):
        numbers = (
            f"{len(before)} points before and {len(after)} after, {len(domains)} domains and {len(classes)} classes"
        )
        raise ValueError(f"{numbers} are given; one each is needed for every example")
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 4.4), layout="constrained")
    colours, markers, kinds = plt.get_cmap("tab10").colors, "osD^vP*X<>", sorted(set(classes))
    for axis, points, title in zip(axes, (before, after), ("before", "after"), strict=True):
        for number, domain in enumerate(dict.fromkeys(domains)):
            for kind in kinds:
                some = [i for i, pair in enumerate(zip(domains, classes, strict=True)) if pair == (domain, kind)]
                if not some:
                    continue
                x, y = points[some].float().cpu().unbind(1)
                style = {"color": colours[number % 10], "marker": markers[kinds.index(kind) % 10]}
                axis.scatter(x, y, s=14, alpha=0.7, linewidths=0, label=_plain(f"{domain}, {kind}"), **style)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    _save(figure, path)


def _plain(text: str) -> str:
    """Text in which a dollar sign is no formula."""
    return text.replace("$", r"\$")


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


def probe_accuracies(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy of probes by layer, beside their control tasks' (dashed) and the most frequent class's (dotted)."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    layers = list(dict.fromkeys(row["layer"] for row in results["probes"]))
    for kind in dict.fromkeys(row["kind"] for row in results["probes"]):
        rows = [row for row in results["probes"] if row["kind"] == kind]
        places = [layers.index(row["layer"]) for row in rows]
        (line,) = axis.plot(places, [100 * row["accuracy"] for row in rows], marker="o", label=kind)
        control = [100 * row["control"] for row in rows]
        axis.plot(places, control, "--", color=line.get_color(), alpha=0.6, label=f"{kind}, control task")
    majority = 100 * results["probes"][0]["majority"]
    axis.axhline(majority, linestyle=":", color="grey", label="most frequent class")
    axis.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
    axis.set_ylabel("accuracy, %")
    axis.set_title(_plain(f"{results['task']}: {len(results['classes'])} classes"), fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    axis.grid(alpha=0.3)
    _save(figure, path)
