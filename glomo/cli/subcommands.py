"""What commands with several words share (`glomo translate run`): which word is meant, and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from glomo.errors import UserError
from glomo.training.config import nearest, split_arguments


def dispatch(
    argv: Sequence[str], command: str, usage: str, commands: Mapping[str, Callable[[Sequence[str]], int]]
) -> int:
    """Do what the first word says; `train` has a help of its own."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    if argv[0] not in commands:
        raise UserError(f"there is no command {command} {argv[0]!r}{nearest(argv[0], list(commands))}")
    if argv[0] != "train" and {"-h", "--help"} & set(argv[1:]):
        print(usage)
        return 0
    return commands[argv[0]](argv[1:])


def folder_and_options(
    argv: Sequence[str], known: Sequence[str], more: str = "", flags: Sequence[str] = ()
) -> tuple[str, str | None, dict[str, str]]:
    """(folder, what stands free behind it or None, {option: value}); ``more`` names what may stand there.

    Raises UserError for an option that is not ``known`` and for too few or too many words.
    """
    arguments = split_arguments(argv, flags=flags)
    for name in arguments.options:
        if name not in known:
            raise UserError(f"unknown option --{name}{nearest(name, list(known), '--')}")
    words = arguments.positional
    if not 1 <= len(words) <= 1 + bool(more):
        wanted = f"a folder and at most one {more} are needed" if more else "one folder is needed"
        raise UserError(f"{wanted}, but {len(words)} words are given: {' '.join(words) or 'none'}")
    return words[0], words[1] if len(words) == 2 else None, arguments.options
