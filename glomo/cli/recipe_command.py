"""What the commands that run a recipe share: their arguments, and their help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from glomo.errors import UserError
from glomo.training.config import describe, load_recipe, read_recipe, recipe_names, recipe_path, split_arguments

Schema = TypeVar("Schema")


def parse(argv: Sequence[str], command: str, schema: type[Schema]) -> tuple[Schema, Path] | None:
    """``RECIPE [--out DIR] [--section.key value ...]`` as (configuration, folder); None when help was printed."""
    arguments = split_arguments(argv)
    options = dict(arguments.options)
    wants_help = options.pop("help", None) is not None
    if wants_help and not arguments.positional:
        print(_usage(command))
        return None
    if len(arguments.positional) != 1:
        names = ", ".join(_recipes_for(command))
        raise UserError(
            f"`glomo {command}` needs one recipe, a name or a file, but has {len(arguments.positional)}; "
            f"known are {names}"
        )
    recipe = arguments.positional[0]
    out = options.pop("out", None) or f"runs/{recipe_path(recipe).stem}"
    config = load_recipe(recipe, options, schema, command)
    if wants_help:
        about = read_recipe(recipe).get("about", "")
        print(f"{_usage(command)}\n\n{recipe}: {about}\n\nkeys, and their values in this recipe:\n{describe(config)}")
        return None
    return config, Path(out)


def _usage(command: str) -> str:
    return (
        f"usage: glomo {command} RECIPE [--out DIR] [--section.key value ...]\n\n"
        f"RECIPE is a .toml file or one of {', '.join(_recipes_for(command))}.\n"
        f"DIR (runs/RECIPE unless given) takes all that is written; the same call goes on where a former one stopped."
    )


def _recipes_for(command: str) -> list[str]:
    return [name for name in recipe_names() if read_recipe(name).get("command") == command]
