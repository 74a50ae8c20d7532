"""``glomo finetune RECIPE``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glomo.cli.recipe_command import run


def main(argv: Sequence[str]) -> int:
    """Fine-tune a classifier as a recipe says."""
    from glomo.training.finetune import FinetuneConfig, finetune

    return run(argv, "finetune", FinetuneConfig, finetune, _summary)


def _summary(results: dict[str, Any], out: Path) -> str:
    accuracy = results["test_accuracy"]
    return (
        f"step {results['step']}, test accuracy {100 * accuracy:.2f} % (error {100 * (1 - accuracy):.2f} %); the "
        f"classifier is in {out / 'final'}, all figures in {out / 'results.json'}"
    )
