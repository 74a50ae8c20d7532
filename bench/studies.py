"""The tables of docs/transfer_study.md, out of the committed results of studies: ``python -m bench.studies``.

``bench/results/studies/NAME.json`` is the results.json of ``glomo study``. Between ``<!-- NAME -->`` and
``<!-- end -->`` in the page stand its tables; this command writes them there.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "studies"
PAGE = ROOT / "docs" / "transfer_study.md"
_PLACE = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each task: mean ± standard deviation of the seeds, paired difference ± its standard error, and how
    many standard errors that is."""
    parts = []
    for task, found in results["tasks"].items():
        first = found["rows"][0]["variant"]
        lines = [
            f"| {task} | {found['measure'].replace('_', ' ')}, % | against {first}, points | standard errors | "
            "seeds | validation loss | zeros, % | dead rows, % |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            losses = [loss for loss in results["losses"].get(row["variant"], ()) if loss is not None]
            cells = [
                row["variant"],
                _percent(row["mean"], row["std"]),
                *_difference(row["difference"]),
                str(row["count"]),
                f"{statistics.fmean(losses):.3f}" if losses else "",
                "" if row["share_zero"] is None else f"{100 * row['share_zero']:.0f}",
                "" if row["share_dead"] is None else f"{100 * row['share_dead']:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _difference(found: Mapping[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    error = found["error"]
    return _percent(found["mean"], error, "+"), f"{found['mean'] / error:+.1f}" if error else ""


def _percent(mean: float, spread: float | None, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def filled(page: str) -> str:
    """The page with every table as the results have it."""

    def table(found: re.Match[str]) -> str:
        results = json.loads((RESULTS / f"{found[2]}.json").read_text(encoding="utf-8"))
        return f"{found[1]}{markdown(results)}\n{found[3]}"

    return _PLACE.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE}: {len(list(RESULTS.glob('*.json')))} studies")
