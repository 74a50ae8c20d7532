"""``glomo recipes ls`` and ``glomo recipes cp NAME [DEST]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glomo.errors import UserError
from glomo.training.config import nearest, read_recipe, recipe_names, recipe_path

USAGE = "usage: glomo recipes ls | glomo recipes cp NAME [DEST]"


def main(argv: Sequence[str]) -> int:
    """List the recipes, or copy one to a file that can be changed."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    action, *rest = argv
    if action == "ls" and not rest:
        for name in recipe_names():
            recipe = read_recipe(name)
            print(f"{name:<18} {recipe['command']:<9} {recipe['about']}")
        return 0
    if action == "cp" and len(rest) in (1, 2):
        source = recipe_path(rest[0])
        target = Path(rest[1]) if len(rest) == 2 else Path(source.name)
        if target.is_dir():
            target = target / source.name
        if target.exists():
            raise UserError(f"{target} exists already; choose another name")
        target.write_bytes(source.read_bytes())
        print(target)
        return 0
    raise UserError(f"`glomo recipes {action}`{nearest(action, ['ls', 'cp'])}; {USAGE}")
