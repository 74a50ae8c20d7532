"""``glomo pretrain RECIPE``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glomo.cli.recipe_command import run
from glomo.training.pretrain import PretrainConfig, pretrain


def main(argv: Sequence[str]) -> int:
    """Pre-train a graph as a recipe says."""
    return run(argv, "pretrain", PretrainConfig, pretrain, _summary)


def _summary(row: dict[str, Any], out: Path) -> str:
    valid = f", validation loss {row['valid_loss']:.4f}" if "valid_loss" in row else ""
    return f"step {row['step']}, loss {row['loss']:.4f}{valid}; the graph is in {out / 'final'}"
