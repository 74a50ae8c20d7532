"""``glomo demo``: the main job on real input, from unlabelled text to a table and pictures.

Two chains run beside each other, on one thread each: a graph of WikiText-2 transferred to TREC questions (real); and a
graph of key-value recall (synthetic, built to need a link), behind which the graph that comes with the package is tried
on sentences that answer questions or do not (real).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from glomo.errors import UserError

SHIPPED = "graph-en-small"
SENTENCE = "The river that flows through the old city was named after the king who built its first bridge ."
TRAIN = ("--train.threads", "1")
USAGE = """usage: glomo demo [--out DIR]

pre-trains a graph on real text and transfers it to a real labelled task beside all controls, does the same on the
synthetic recall task, tries the graph that comes with the package on a second real task, prints the tables and draws
the pictures. DIR (demo unless given) takes all that is written; the same call goes on where a former one stopped.
About three minutes on two CPU cores, and 160 MB of downloads once."""

NOTE = """\
How to read it: `none` is the classifier without a graph; uniform, band (neighbours at distance 1 to 3) and random (a
graph predictor that was never trained) are the controls. `learned - it` is the paired difference over the seeds: a
difference that is not clearly larger than its own ± says nothing. zeros: share of the weights that are exactly 0;
dead: share of the targets that read nothing at all though they could."""


def main(argv: Sequence[str]) -> int:
    """Run the demo."""
    from glomo.training.config import split_arguments

    arguments = split_arguments(argv)
    options = dict(arguments.options)
    if "help" in options:
        print(USAGE)
        return 0
    out = Path(options.pop("out", "demo"))
    if options or arguments.positional:
        wrong = next(iter([f"--{name}" for name in options] or arguments.positional))
        raise UserError(f"`glomo demo` knows only --out DIR, not {wrong}")
    return demo(out)


def demo(out: Path) -> int:
    """Fetch, train, compare, draw; the exit code."""
    from glomo.data.catalogue import fetch, load_vectors

    started = time.monotonic()
    for name in ("wikitext-2", "trec", "glove-50d", "qnli"):
        fetch(name)
    load_vectors("glove-50d")  # the first time it is parsed, which takes a while
    print(f"data ready after {time.monotonic() - started:.0f} s\n")

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    text, recall = out / "text-graph", out / "recall-graph"
    questions, links, answers = out / "questions", out / "recall", out / "answers"
    log = out / "recall.log"
    with log.open("w", encoding="utf-8") as stream:
        beside = subprocess.Popen(
            [sys.executable, "-c", _program(*_chain("recall", recall, links), _with_shipped(answers))],
            stdout=stream,
            stderr=stream,
            env=_environment(),
        )
        try:
            print(f"two chains, one core each; the recall task writes to {log}\n")
            program = _program(*_chain("demo", text, questions))
            front = subprocess.run([sys.executable, "-c", program], env=_environment())
            code = front.returncode or beside.wait()
        finally:
            beside.terminate()
    if code:
        print(f"glomo: the demo stopped; what its two halves said is above and in {log}", file=sys.stderr)
        return code
    tables = {
        "real: TREC questions, 1000 labels, the graph that was pre-trained just now": questions,
        f"real: does a sentence answer a question, 8000 labels, {SHIPPED}, which comes with the package": answers,
        "synthetic: key-value recall, 300 labels": links,
    }
    report(out, tables)
    print(f"\n{time.monotonic() - started:.0f} s in all, data aside")
    return 0


def _chain(name: str, graph: Path, transfer: Path) -> tuple[list[str], list[str]]:
    """The commands that pre-train and transfer."""
    first = ["pretrain", f"graph-{name}", "--out", str(graph), *TRAIN]
    return first, ["transfer", f"transfer-{name}", "--graph.path", str(graph), "--out", str(transfer), *TRAIN]


def _with_shipped(transfer: Path) -> list[str]:
    """The command that tries the package's graph, on held-out training pairs."""
    task = ["--data.labels", "8000", "--data.judge", "valid", "--data.judged", "2000"]
    runs = ["--train.steps", "250", "--compare.seeds", "2"]
    graphs = ["--graph.path", SHIPPED, "--graph.cut", "4", "--compare.graphs", "none,uniform,band,learned"]
    return ["transfer", "transfer-qnli", *task, *runs, *graphs, "--out", str(transfer), *TRAIN]


def _program(*commands: list[str]) -> str:
    """A program that runs commands of glomo one after the other, until one fails."""
    return f"from glomo.cli.main import main\nraise SystemExit(next(filter(None, map(main, {commands!r})), 0))"


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def report(out: Path, tasks: dict[str, Path]) -> None:
    """The tables, and the pictures with their places."""
    from glomo.cli.plot import draw
    from glomo.plots import accuracies
    from glomo.training.comparison import table

    pictures = []
    for title, folder in tasks.items():
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        print(f"\n{title}\n{table(results)}")
        pictures.append(folder / "accuracies.png")
        accuracies(results, pictures[-1])
    print(f"\n{NOTE}\n")
    pictures += draw(out / "text-graph", SENTENCE, out / "pictures")
    pictures += draw(out / "recall-graph", _recall_sentence(), out / "pictures-recall")
    print("pictures\n" + "\n".join(f"  {path}" for path in pictures))


def _recall_sentence() -> str:
    from glomo.data.recall import Recall

    task = Recall()
    (units, _label), *_ = task.labelled(1, seed=12345)
    return " ".join(task.vocabulary.words[unit] for unit in units)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
