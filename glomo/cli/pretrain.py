"""``glomo pretrain RECIPE``."""

from __future__ import annotations

from collections.abc import Sequence

from glomo.cli.recipe_command import run, trained
from glomo.training.pretrain import PretrainConfig, pretrain


def main(argv: Sequence[str]) -> int:
    """Pre-train a graph as a recipe says."""
    return run(argv, "pretrain", PretrainConfig, pretrain, trained("graph"))
