"""``glomo probe RUN --task TASK``: what each layer of a trained model tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from glomo.cli.subcommands import folder_and_options
from glomo.errors import UserError
from glomo.training.config import Text, convert, split_arguments

USAGE = """usage: glomo probe RUN --task length|content|shift (--text FILE [--column C] | --dataset NAME [--split S])
       glomo probe RUN --task FILE [--text-column C] [--label-column C]
       glomo probe RUN --task label --dataset NAME [--split S]

RUN is the folder of `glomo lm train` or `glomo finetune`, or a checkpoint. On every layer's features of texts a linear
probe and one with a hidden layer are trained, and the same on a control task: random labels that are a function of a
text's first word. --out DIR (RUN/probes/TASK unless given) takes results.json and probes.png.

length   how many words has the text? six classes
content  which of --words (1000) words is in it? those behind the --first-rank (2000) most frequent that have --per-word
         (120) texts each
shift    have two adjacent words been swapped?
FILE     .csv, .tsv or .jsonl with a text and a label column

--kind both    linear, mlp, both
--pool mean    what becomes of the units of a text: mean, last, max
--limit 10000  texts at most
--length 256   units at which a text is cut (surface tasks leave longer ones out)
--seed 0"""


def main(argv: Sequence[str]) -> int:
    """Probe a run."""
    if not argv or "help" in split_arguments(argv).options:
        print(USAGE)
        return 0 if argv else 2
    from glomo.training.probing import ProbeOptions, probe_run

    kinds = get_type_hints(ProbeOptions)
    run, _, given = folder_and_options(argv, (*kinds, "out"))
    out = given.pop("out", None)
    if "task" not in given:
        raise UserError("probe needs a task: --task length, content, shift, label or a file of labelled texts")
    values = {name: convert(Text(value), kinds[name], f"--{name.replace('_', '-')}") for name, value in given.items()}
    options = ProbeOptions(**values)
    folder = Path(out) if out else Path(run) / "probes" / Path(options.task).stem
    results = probe_run(run, options, folder)
    print(table(results))
    try:
        from glomo.plots import probe_accuracies

        probe_accuracies(results, folder / "probes.png")
    except ImportError:
        raise UserError("the picture needs matplotlib, which is not installed; pip install matplotlib") from None
    print(f"{results['texts']:,} texts, {results['left_out']:,} left out; all figures are in {folder / 'results.json'}")
    return 0


def table(results: Mapping[str, Any]) -> str:
    """A line for each probe; percent."""
    columns = ("accuracy", "majority", "control", "selectivity")
    width = max(len("layer"), *(len(row["layer"]) for row in results["probes"]))
    lines = [f"{'probe':<8}{'layer':<{width}}" + "".join(f"{column:>13}" for column in columns)]
    for row in results["probes"]:
        figures = "".join(f"{100 * row[column]:13.2f}" for column in columns)
        lines.append(f"{row['kind']:<8}{row['layer']:<{width}}{figures}")
    return "\n".join(lines)
