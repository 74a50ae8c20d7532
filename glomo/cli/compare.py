"""``glomo compare RECIPE``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glomo.cli.recipe_command import run
from glomo.training.config import read_recipe, split_arguments


def main(argv: Sequence[str]) -> int:
    """Train in several ways, and put them beside each other."""
    from glomo.training.compare import SCHEMAS, CompareConfig, compare

    return run(argv, "compare", SCHEMAS.get(_of(argv), CompareConfig), compare, _summary)


def _of(argv: Sequence[str]) -> str:
    """What is trained, on which the recipe's other sections depend; "" where nothing says it."""
    arguments = split_arguments(argv)
    said = read_recipe(arguments.positional[0]).get("compare") if arguments.positional else None
    return arguments.options.get("compare.of") or str(said.get("of", "") if isinstance(said, dict) else "")


def _summary(results: dict[str, Any], out: Path) -> str:
    from glomo.training.compare import curves, table

    lines = [table(results), "", f"all figures are in {out / 'results.json'}"]
    try:
        from glomo import plots

        plots.trade_off(results, out / "trade-off.png")
        plots.error_curves(curves(results, out), out / "curves.png", results["scale"])
        plots.low_shot(results, out / "low-shot.png")
        lines.append(f"pictures: {', '.join(sorted(path.name for path in out.glob('*.png')))}")
    except ImportError:
        lines.append("no pictures: matplotlib is not installed (pip install matplotlib)")
    return "\n".join(lines)
