"""What the commands that run a recipe share: their arguments, their help, and the ways in which they end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from glomo.errors import UserError
from glomo.training.config import describe, load_recipe, read_recipe, recipe_names, recipe_path, split_arguments
from glomo.training.distributed import is_first
from glomo.training.loop import Interrupted

Schema = TypeVar("Schema")
Result = TypeVar("Result")
# PyTorch's several sentences about memory all come as a RuntimeError
NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "allocate more than",
    "size calculation overflowed",
)


def run(
    argv: Sequence[str],
    command: str,
    schema: type[Schema],
    work: Callable[[Schema, Path], Result],
    summary: Callable[[Result, Path], str],
    words: str = "",
    runs: str = "runs",
) -> int:
    """Do ``work(configuration, folder)``, print ``summary(its result, folder)``, and return the exit code. ``command``
    is what recipes say; ``words``, if they differ, are what is typed; ``runs/RECIPE`` is the folder unless --out says.

    Raises UserError for mistakes, and where there is too little memory.
    """
    parsed = parse(argv, command, schema, words or command, runs)
    if parsed is None:
        return 0
    try:
        result = work(*parsed)
    except Interrupted as stop:
        print(f"glomo: {stop}", file=sys.stderr)
        return stop.exit_code
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error).lower() for words in NO_MEMORY):
            raise
        reason = (str(error).splitlines() or ["no more is there"])[0]
        raise UserError(
            f"out of memory ({reason}); a smaller model, train.batch_size or data.length is needed"
        ) from error
    if is_first():
        print(summary(result, parsed[1]))
    return 0


def trained(what: str) -> Callable[[dict[str, Any], Path], str]:
    """A summary of the last metrics row, and where the ``what`` that came of it is."""

    def summary(row: dict[str, Any], out: Path) -> str:
        valid = f", validation loss {row['valid_loss']:.4f}" if "valid_loss" in row else ""
        return f"step {row['step']}, loss {row['loss']:.4f}{valid}; the {what} is in {out / 'final'}"

    return summary


def parse(
    argv: Sequence[str], command: str, schema: type[Schema], words: str, runs: str = "runs"
) -> tuple[Schema, Path] | None:
    """``RECIPE [--out DIR] [--section.key value ...]`` as (configuration, folder); None when help was printed."""
    arguments = split_arguments(argv)
    options = dict(arguments.options)
    wants_help = options.pop("help", None) is not None
    if wants_help and not arguments.positional:
        print(_usage(command, words))
        return None
    if len(arguments.positional) != 1:
        names = ", ".join(_recipes_for(command))
        raise UserError(
            f"`glomo {words}` needs one recipe, a name or a file, but has {len(arguments.positional)}; "
            f"known are {names}"
        )
    recipe = arguments.positional[0]
    out = options.pop("out", None) or f"{runs}/{recipe_path(recipe).stem}"
    config = load_recipe(recipe, options, schema, command)
    if wants_help:
        about = read_recipe(recipe).get("about", "")
        print(f"{_usage(command, words)}\n\n{recipe}: {about}\n")
        print(f"keys, and their values in this recipe:\n{describe(config)}")
        return None
    return config, Path(out)


def _usage(command: str, words: str) -> str:
    return (
        f"usage: glomo {words} RECIPE [--out DIR] [--section.key value ...]\n\n"
        f"RECIPE is a .toml file or one of {', '.join(_recipes_for(command))}.\n"
        f"DIR (runs/RECIPE unless given) takes all that is written; the same call goes on where a former one stopped."
    )


def _recipes_for(command: str) -> list[str]:
    return [name for name in recipe_names() if read_recipe(name).get("command") == command]
