"""Pictures of results: speed over T, memory over T, speed over block sparsity, and bars of ratios."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.report import OURS, best_peer, case_name, flops_per_second, info, label, measured, ratio
from bench.results import Row

Panels = dict[str, dict[str, dict[float, Row]]]
"""Title -> name of a line -> x -> row."""


def over_length(rows: Sequence[Row]) -> Panels:
    """Cases that differ in T alone, or in T with a fixed number of positions B * T; panels with two lengths or more."""
    panels: Panels = defaultdict(lambda: defaultdict(dict))
    for r in filter(lambda r: r["stats"] and not info(r, "clusters"), rows):
        tokens = info(r, "shape").split()
        batch, rest = int(tokens[0][1:]), [t for t in tokens[1:] if t != f"T{info(r, 'length')}"]
        for size in (f"B {batch}", f"B·T {batch * info(r, 'length')}"):
            title = "\n".join([f"{info(r, 'op')}, {info(r, 'direction')}", " ".join([info(r, "dtype"), size, *rest])])
            panels[title][label(r)][info(r, "length")] = r
    return _with_two_points(panels)


def over_sparsity(rows: Sequence[Row]) -> Panels:
    """The share of the score matrix that is whole tiles without a positive score."""
    panels: Panels = defaultdict(lambda: defaultdict(dict))
    for r in filter(lambda r: r["stats"] and info(r, "clusters"), rows):
        shape = " ".join(t for t in info(r, "shape").split() if not t.startswith("clusters"))
        title = f"{info(r, 'op')}, {info(r, 'direction')}\n{info(r, 'dtype')} {shape}"
        panels[title][label(r)][1 - 1 / info(r, "clusters")] = r
    return _with_two_points(panels)


def _with_two_points(panels: Panels) -> Panels:
    return {title: lines for title, lines in panels.items() if len({x for line in lines.values() for x in line}) > 1}


def draw(rows: Sequence[Row], folder: Path, name: str) -> list[Path]:
    """Writes <name>-speed.png and so on, each where there is something to show; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {
        "speed": (over_length(rows), "GFLOP/s", lambda r: flops_per_second(r) / 1e9, "T"),
        "memory": (over_length(rows), "peak memory, MB", lambda r: (info(r, "peak_memory") or float("nan")) / 1e6, "T"),
        "sparsity": (over_sparsity(rows), "ms", lambda r: 1e3 * r["stats"]["median"], "share of empty tiles"),
    }
    files = []
    for kind, (panels, y_label, y, x_label) in kinds.items():
        if panels:
            files.append(folder / f"{name}-{kind}.png")
            _lines(panels, files[-1], x_label, y_label, y)
    files.append(folder / f"{name}-ratios.png")
    _bars(rows, files[-1])
    return files


def _lines(panels: Panels, path: Path, x_label: str, y_label: str, y: Callable[[Row], float]) -> None:
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4.6 * columns, 3.4 * height), squeeze=False)
    peers = dict.fromkeys(
        info(r, "peer") for lines in panels.values() for line in lines.values() for r in line.values()
    )
    colors = {peer: f"C{i % 10}" for i, peer in enumerate(peers)}
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for line, points in lines.items():
            xs = sorted(points)
            style: dict[str, Any] = {"linewidth": 2.4 if line.startswith(OURS) else 1.1, "marker": "o", "markersize": 3}
            color = colors[info(points[xs[0]], "peer")]
            axis.plot(xs, [y(points[x]) for x in xs], label=line, color=color, **style)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel(x_label, fontsize=8)
        axis.set_ylabel(y_label, fontsize=8)
        axis.tick_params(labelsize=7)
        if x_label == "T":
            axis.set_xscale("log", base=2)
        if "memory" in y_label:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _bars(rows: Sequence[Row], path: Path) -> None:
    """Time of the best peer and of the eager formula over ours, a pair of bars for every case."""
    import matplotlib.pyplot as plt

    found = []
    for group in results.latest(rows).values():
        ours, best = measured(group).get(OURS), best_peer(group)
        if ours is not None and best is not None:
            eager = measured(group).get("eager", best)
            found.append((f"{case_name(ours)} ({info(best, 'peer')})", ratio(best, ours), ratio(eager, ours)))
    names, best_ratios, eager_ratios = (list(c) for c in zip(*found, strict=True)) if found else ([], [], [])
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.32 * len(names)))
    places = range(len(names))
    axis.barh([p - 0.2 for p in places], best_ratios, 0.4, label="best peer / ours")
    axis.barh([p + 0.2 for p in places], eager_ratios, 0.4, label="eager / ours", color="0.7")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(list(places), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel("time of the peer / time of ours (above 1: ours is faster)", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
