"""The command ``glomo``: finds the command, and turns mistakes into one sentence and the exit code 2."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from glomo.errors import UserError

COMMANDS = {
    "pretrain": "pre-train a graph on unlabelled text",
    "transfer": "train a classifier with graphs, and compare them with controls",
    "study": "graphs pre-trained in several ways, and controls, on several tasks",
    "lm": "train a causal language model; its perplexity; text from it",
    "finetune": "train a classifier on a language model",
    "compare": "several ways of fine-tuning beside each other: error, seconds, memory",
    "probe": "what each layer of a trained model tells, beside control tasks",
    "translate": "train a translator on sentence pairs; use it; judge it",
    "plot": "draw the graph over a sentence",
    "export": "write a graph without what trained it, in half precision",
    "demo": "all of it on real text in three minutes",
    "info": "which backends run here, and why",
    "data": "ls: the open data sets; fetch: download one",
    "recipes": "ls: the recipes; cp: copy one to change it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 after a mistake, 130 or 143 when stopped by a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(argv)
        sys.stdout.flush()  # here, where a full disk can still be told in a sentence
        return code
    except UserError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        _flush()
        return 141
    except OSError as error:
        full = "the output cannot be written" if error.errno == errno.ENOSPC else ""  # as with `> FILE` on a full disk
        where = error.filename or full
        return _refuse(f"{where}: {error.strerror}" if where else str(error))
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    name = argv[0]
    if name in ("--version", "-V"):
        from importlib.metadata import version

        print(f"glomo {version('glomo')}")
        return 0
    if name not in COMMANDS:
        from glomo.training.config import nearest

        raise UserError(f"there is no command {name!r}{nearest(name, list(COMMANDS))}")
    from glomo.kernels.backend import forced_backend
    from glomo.kernels.cpu_library import why_missing

    try:
        forced_backend()
        why_missing()
    except ValueError as error:
        raise UserError(str(error)) from None
    return importlib.import_module(f"glomo.cli.{name}").main(argv[1:])


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {meaning}" for name, meaning in COMMANDS.items())
    return f"usage: glomo COMMAND ...\n\n{rows}\n\n`glomo COMMAND --help` says more; `glomo --version` the version."


def _flush() -> None:
    """Write what was printed; where that cannot be it is dropped, or Python would complain of it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(sentence: str) -> int:
    _flush()
    print(f"glomo: {' '.join(sentence.split())}", file=sys.stderr)
    return 2
