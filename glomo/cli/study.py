"""``glomo study RECIPE``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glomo.cli.recipe_command import run


def main(argv: Sequence[str]) -> int:
    """Pre-train in several ways, transfer to several tasks, and put all of it beside each other."""
    from glomo.training.study import StudyConfig, study

    return run(argv, "study", StudyConfig, study, _summary)


def _summary(results: dict[str, Any], out: Path) -> str:
    from glomo.training.study import table

    lines = [table(results), "", f"all figures are in {out / 'results.json'}"]
    try:
        from glomo import plots

        plots.study(results, out / "study.png")
        lines.append(f"picture: {out / 'study.png'}")
    except ImportError:
        lines.append("no picture: matplotlib is not installed (pip install matplotlib)")
    return "\n".join(lines)
