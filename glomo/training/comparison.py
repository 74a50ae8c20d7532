"""Results of several graphs and seeds, side by side: means, spreads and paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """One trained model: its figures (accuracy, or f1 and exact_match, from 0 to 1), shares of zero weights and dead
    rows in the graph, seconds, and what was counted on the way."""

    graph: str
    seed: int
    figures: Mapping[str, float]
    share_zero: float | None
    share_dead: float | None
    seconds: float
    counts: Mapping[str, int] = field(default_factory=dict)


def compare(runs: Sequence[Run], measure: str = "accuracy") -> dict[str, Any]:
    """{"measure", "runs", "graphs", "differences"} as plain JSON.

    "graphs" has for each graph mean, sample standard deviation and standard error (None for one seed) of the figure
    `measure`, and the means of the rest; "differences" has, for each other graph, the same of (learned - it) over
    common seeds.
    """
    graphs = list(dict.fromkeys(run.graph for run in runs))
    of = {graph: [run for run in runs if run.graph == graph] for graph in graphs}
    figure = {graph: {run.seed: run.figures[measure] for run in of[graph]} for graph in graphs}
    differences = {}
    if "learned" in of:
        for other in graphs:
            common = [seed for seed in figure["learned"] if other != "learned" and seed in figure[other]]
            if common:
                differences[f"learned - {other}"] = spread([figure["learned"][s] - figure[other][s] for s in common])
    return {
        "measure": measure,
        "runs": [asdict(run) for run in runs],
        "graphs": {
            graph: {
                **spread(list(figure[graph].values())),
                "figures": {name: statistics.fmean(run.figures[name] for run in of[graph]) for name in runs[0].figures},
                "share_zero": mean([run.share_zero for run in of[graph]]),
                "share_dead": mean([run.share_dead for run in of[graph]]),
                "seconds": mean([run.seconds for run in of[graph]]),
            }
            for graph in graphs
        },
        "differences": differences,
    }


def table(results: dict[str, Any]) -> str:
    """The results as a table to read, in per cent: mean ± standard deviation, and the paired difference ± its standard
    error."""
    others = [name for name in next(iter(results["graphs"].values()))["figures"] if name != results["measure"]]
    titles = [f"{name.replace('_', ' ')} %" for name in (results["measure"], *others)]
    rows = [("graph", *titles, "learned - it", "zeros %", "dead %", "seconds")]
    for graph, found in results["graphs"].items():
        difference = results["differences"].get(f"learned - {graph}")
        rows.append(
            (
                graph,
                _percent(found["mean"], found["std"]),
                *(_percent(found["figures"][name]) for name in others),
                _percent(difference["mean"], difference["error"], "+") if difference else "",
                _percent(found["share_zero"]),
                _percent(found["share_dead"]),
                f"{found['seconds']:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and standard error (None for one value) and how many there are."""
    std = statistics.stdev(values) if len(values) > 1 else None
    error = None if std is None else std / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "std": std, "error": error, "count": len(values)}


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _percent(mean: float | None, std: float | None = None, sign: str = "") -> str:
    if mean is None:
        return ""
    return f"{100 * mean:{sign}.1f}" + ("" if std is None else f" ± {100 * std:.1f}")
