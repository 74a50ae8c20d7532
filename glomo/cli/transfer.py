"""``glomo transfer RECIPE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from glomo.cli.recipe_command import parse
from glomo.training.comparison import table
from glomo.training.distributed import is_first
from glomo.training.loop import Interrupted
from glomo.training.transfer import TransferConfig, transfer


def main(argv: Sequence[str]) -> int:
    """Train and compare classifiers as a recipe says."""
    parsed = parse(argv, "transfer", TransferConfig)
    if parsed is None:
        return 0
    config, out = parsed
    try:
        results = transfer(config, out)
    except Interrupted as stop:
        print(f"glomo: {stop}", file=sys.stderr)
        return stop.exit_code
    if not is_first():
        return 0
    print(f"{table(results)}\n\nall figures are in {out / 'results.json'}")
    return 0
