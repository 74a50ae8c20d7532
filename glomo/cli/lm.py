"""``glomo lm train RECIPE``, ``eval FOLDER`` and ``run FOLDER``."""

from __future__ import annotations

from collections.abc import Sequence

from glomo.cli.recipe_command import run, trained
from glomo.cli.subcommands import dispatch, folder_and_options
from glomo.errors import UserError
from glomo.training.config import Text, convert

USAGE = """usage: glomo lm train RECIPE [--out DIR] [--section.key value ...]
       glomo lm eval FOLDER (--text FILE [--column COLUMN] | --dataset NAME [--split test]) [--stride N]
       glomo lm run FOLDER [PROMPT] [--units N] [--temperature X] [--top-k N] [--seed N]

train  trains a causal language model as a recipe says
eval   prints its perplexity, a unit and a word, on a text
run    writes on from a prompt"""


def main(argv: Sequence[str]) -> int:
    """Train, judge or use a language model."""
    return dispatch(argv, "lm", USAGE, {"train": _train, "eval": _evaluate, "run": _run})


def _train(argv: Sequence[str]) -> int:
    from glomo.training.language import LanguageConfig, train_language_model

    return run(argv, "lm", LanguageConfig, train_language_model, trained("language model"), "lm train")


def _evaluate(argv: Sequence[str]) -> int:
    from glomo.training.language_model import load_language_model

    folder, _, options = folder_and_options(argv, ("text", "column", "dataset", "split", "stride"))
    if ("text" in options) == ("dataset" in options):
        raise UserError("eval needs the text to judge by: --text FILE or --dataset NAME, one of them")
    for name, other in (("column", "text"), ("split", "dataset")):
        if name in options and other not in options:
            raise UserError(f"--{name} goes with --{other}, which is not given")
    model = load_language_model(folder)
    if "text" in options:
        from glomo.data import read_texts

        texts = read_texts(options["text"], options.get("column", "text"))
    else:
        from glomo.data import catalogue

        texts = catalogue.load_texts(options["dataset"], options.get("split", "test"))
    stride = convert(Text(options["stride"]), int, "--stride") if "stride" in options else None
    for name, value in model.perplexity(texts, stride, progress=True).items():
        print(f"{name:<18}{value:,}")
    return 0


def _run(argv: Sequence[str]) -> int:
    from glomo.training.language_model import load_language_model

    folder, prompt, options = folder_and_options(argv, ("units", "temperature", "top_k", "seed"), "prompt")
    given = {
        name: convert(Text(value), float if name == "temperature" else int, f"--{name.replace('_', '-')}")
        for name, value in options.items()
    }
    print(load_language_model(folder).generate(prompt or "", **given))
    return 0
