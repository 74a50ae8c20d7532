"""``glomo compare RECIPE``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glomo.cli.recipe_command import run


def main(argv: Sequence[str]) -> int:
    """Fine-tune in several ways, and put them beside each other."""
    from glomo.training.compare import CompareConfig, compare

    return run(argv, "compare", CompareConfig, compare, _summary)


def _summary(results: dict[str, Any], out: Path) -> str:
    from glomo.training.compare import curves, table

    lines = [table(results), "", f"all figures are in {out / 'results.json'}"]
    try:
        from glomo import plots

        plots.trade_off(results, out / "trade-off.png")
        plots.error_curves(curves(results, out), out / "curves.png")
        plots.low_shot(results, out / "low-shot.png")
        lines.append(f"pictures: {', '.join(sorted(path.name for path in out.glob('*.png')))}")
    except ImportError:
        lines.append("no pictures: matplotlib is not installed (pip install matplotlib)")
    return "\n".join(lines)
