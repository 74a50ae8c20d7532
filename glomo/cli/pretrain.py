"""``glomo pretrain RECIPE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from glomo.cli.recipe_command import parse
from glomo.training.distributed import is_first
from glomo.training.loop import Interrupted
from glomo.training.pretrain import PretrainConfig, pretrain


def main(argv: Sequence[str]) -> int:
    """Pre-train a graph as a recipe says."""
    parsed = parse(argv, "pretrain", PretrainConfig)
    if parsed is None:
        return 0
    config, out = parsed
    try:
        row = pretrain(config, out)
    except Interrupted as stop:
        print(f"glomo: {stop}", file=sys.stderr)
        return stop.exit_code
    if not is_first():
        return 0
    valid = f", validation loss {row['valid_loss']:.4f}" if "valid_loss" in row else ""
    print(f"step {row['step']}, loss {row['loss']:.4f}{valid}; the graph is in {out / 'final'}")
    return 0
