"""``glomo translate train RECIPE``, ``run FOLDER`` and ``eval FOLDER``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glomo.cli.recipe_command import run, trained
from glomo.cli.subcommands import dispatch, folder_and_options
from glomo.errors import UserError
from glomo.training.config import Text, convert

USAGE = """usage: glomo translate train RECIPE [--out DIR] [--section.key value ...]
       glomo translate run FOLDER [FILE] [--beam N] [--length-penalty X]
       glomo translate eval FOLDER (--pairs FILE [--source COLUMN] [--target COLUMN] | --dataset NAME) [--split test]
                                   [--swap] [--limit N] [--beam N] [--length-penalty X] [--out FILE]

train  trains a translator as a recipe says
run    translates the lines of a text file, or of what is typed, to the standard output
eval   translates pairs and prints BLEU and chrF (sacrebleu); --out keeps the translations"""


def main(argv: Sequence[str]) -> int:
    """Train, use or judge a translator."""
    return dispatch(argv, "translate", USAGE, {"train": _train, "run": _run, "eval": _evaluate})


def _train(argv: Sequence[str]) -> int:
    from glomo.training.translation import TranslationConfig, train_translation

    return run(argv, "translate", TranslationConfig, train_translation, trained("translator"), "translate train")


def _translator(folder: str, options: dict[str, str]) -> Any:
    from glomo.training.translator import load_translator

    translator = load_translator(folder)
    method = translator.method
    beam = convert(Text(options.get("beam", method.beam)), int, "--beam")
    penalty = convert(Text(options.get("length_penalty", method.length_penalty)), float, "--length-penalty")
    translator.method = dataclasses.replace(method, beam=beam, length_penalty=penalty)
    return translator


def _run(argv: Sequence[str]) -> int:
    folder, file, options = folder_and_options(argv, ("beam", "length_penalty"), "file")
    translator = _translator(folder, options)
    if file:
        from glomo.data import read_texts

        lines = read_texts(file)
    else:
        lines = [line.strip() for line in sys.stdin]
    for line in translator.translate(lines, progress=bool(file)):
        print(line)
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    known = ("pairs", "dataset", "split", "source", "target", "swap", "limit", "beam", "length_penalty", "out")
    folder, _, options = folder_and_options(argv, known, flags=("swap",))
    if ("pairs" in options) == ("dataset" in options):
        raise UserError("eval needs the pairs to judge by: --pairs FILE or --dataset NAME, one of them")
    translator = _translator(folder, options)
    if "pairs" in options:
        from glomo.data import read_pairs

        pairs = read_pairs(options["pairs"], options.get("source", "source"), options.get("target", "target"))
    else:
        from glomo.data import catalogue

        pairs = catalogue.load_pairs(options["dataset"], options.get("split", "test"))
    if "swap" in options:
        pairs = [(b, a) for a, b in pairs]
    limit = options.get("limit", str(len(pairs)))
    if not limit.isdigit() or not int(limit):
        raise UserError(f"--limit is {limit!r}; a number of pairs is needed")
    pairs = pairs[:: max(1, len(pairs) // int(limit))][: int(limit)]
    figures, found = translator.evaluate(pairs, progress=True)
    if "out" in options:
        rows = [{"source": a, "target": b, "found": text} for (a, b), text in zip(pairs, found, strict=True)]
        Path(options["out"]).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    for name, value in figures.items():
        print(f"{name:<18}{value:,}" if isinstance(value, int) else f"{name:<18}{value}")
    return 0
