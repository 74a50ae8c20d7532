"""``glomo finetune RECIPE``, ``glomo finetune rates RECIPE`` and ``glomo finetune eval FOLDER ...``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glomo.cli.recipe_command import run
from glomo.errors import UserError
from glomo.training.config import nearest, split_arguments

USAGE = """usage: glomo finetune RECIPE [--out DIR] [--section.key value ...]
       glomo finetune rates RECIPE [--out DIR] [--section.key value ...]
       glomo finetune eval FOLDER [FOLDER ...] [--task NAME]
                           (--test FILE [--text-column C] [--label-column C] | --dataset NAME)

RECIPE        trains a classifier of documents on a language model
rates RECIPE  draws the loss against the learning rate, and suggests one
eval FOLDER   accuracy of a trained classifier, or of several (forward and backward): the mean of their probabilities;
              --task: that of another task, which has learned along ([tasks], [close] lwf)"""


def main(argv: Sequence[str]) -> int:
    """Fine-tune a classifier as a recipe says, find a rate for it, or judge it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "eval":
        if {"-h", "--help"} & set(argv):
            print(USAGE)
            return 0
        return _evaluate(argv[1:])
    from glomo.training.finetune import finetune
    from glomo.training.finetune_config import FinetuneConfig

    if argv[0] == "rates":
        return run(argv[1:], "finetune", FinetuneConfig, _rates, _suggestion, "finetune rates", "rates")
    return run(argv, "finetune", FinetuneConfig, finetune, _summary)


def _rates(config: Any, out: Path) -> dict[str, Any]:
    from glomo import plots
    from glomo.training.finetune import prepare
    from glomo.training.loop import set_up
    from glomo.training.lr_finder import find_rate

    world = set_up(config.train)
    found = find_rate(prepare(config, world).task, config.train, world)
    try:
        plots.rate_test(found, out / "rates.png")
    except ImportError:
        raise UserError("the picture needs matplotlib, which is not installed; pip install matplotlib") from None
    return found


def _suggestion(found: dict[str, Any], out: Path) -> str:
    rate = found["suggestion"]
    said = (
        "the loss falls at no rate"
        if rate is None
        else f"a tenth of the rate of the lowest loss is --train.lr {rate:.2g}"
    )
    return f"{said}; {out / 'rates.png'} shows {len(found['rates'])} rates"


def _evaluate(argv: Sequence[str]) -> int:
    from glomo.data import read_labelled
    from glomo.training.trained_classifier import load_classifier

    arguments = split_arguments(argv)
    known = ("task", "test", "text_column", "label_column", "dataset", "split")
    for name in arguments.options:
        if name not in known:
            raise UserError(f"unknown option --{name}{nearest(name, known, '--')}")
    options = arguments.options
    if ("test" in options) == ("dataset" in options):
        raise UserError("eval needs labelled examples to judge by: --test FILE or --dataset NAME, one of them")
    if not arguments.positional:
        raise UserError("eval needs the folder of a classifier, or several")
    classifier = load_classifier(*arguments.positional, task=options.get("task", ""))
    if "test" in options:
        columns = options.get("text_column", "text"), options.get("label_column", "label")
        examples = read_labelled(options["test"], *columns)
    else:
        from glomo.data import catalogue

        examples = catalogue.load_labelled(options["dataset"], options.get("split", "test"))
    for name, value in classifier.evaluate(examples).items():
        print(f"{name:<10}{value:,}")
    return 0


def _summary(results: dict[str, Any], out: Path) -> str:
    from glomo.training.adapted import FILE

    accuracy, unseen, adapters = results["test_accuracy"], results.get("zero_shot"), out / FILE
    alone = f" (what has learned alone is {adapters}, {adapters.stat().st_size:,} bytes)" if adapters.exists() else ""
    zero_shot = (
        f"zero-shot accuracy {100 * unseen['accuracy']:.2f} % of {len(unseen['classes'])} unseen classes (chance "
        f"{100 * unseen['chance']:.2f} %); "
        if unseen
        else ""
    )
    return (
        f"step {results['step']}, test accuracy {100 * accuracy:.2f} % (error {100 * (1 - accuracy):.2f} %); "
        f"{zero_shot}the classifier is in {out / 'final'}{alone}, all figures in {out / 'results.json'}"
    )
