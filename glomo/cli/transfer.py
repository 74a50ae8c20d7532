"""``glomo transfer RECIPE``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glomo.cli.recipe_command import run
from glomo.training.comparison import table
from glomo.training.transfer import transfer
from glomo.training.transfer_config import TransferConfig


def main(argv: Sequence[str]) -> int:
    """Train and compare classifiers as a recipe says."""
    return run(argv, "transfer", TransferConfig, transfer, _summary)


def _summary(results: dict[str, Any], out: Path) -> str:
    return f"{table(results)}\n\nall figures are in {out / 'results.json'}"
