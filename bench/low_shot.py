"""`python -m bench.low_shot --general RUN --target RUN --out DIR [--recipe compare-trec] [--labels 50 ...] [--seeds 3]
[--section.key value ...]`: test error against labelled examples, as in figure 3 of Howard & Ruder (2018).

scratch          nothing is transferred
general          the language model of --general (`glomo lm train lm-lstm-small`) as it is
supervised       that, tuned first to the texts of the same labelled examples, in its own vocabulary
semi-supervised  the language model of --target (`glomo lm train lm-lstm-target`), tuned to all texts of the task

The three that transfer are fine-tuned alike (gradual unfreezing). All labels are trained on: nothing is held out, and
the last weights are tested. A call that was stopped goes on; DIR/low-shot.png is the picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

from glomo import plots
from glomo.data import read_texts
from glomo.training.compare import CompareConfig, Ways, compare, table
from glomo.training.config import load_recipe, split_arguments
from glomo.training.texts import LabelledData, labelled, sample

SCRATCH = (
    "--tune.init '' --data.min_count 2 --tune.factor 1 --lstm.dim 200 --lstm.hidden 500 --lstm.layers 2 --train.lr 2e-3"
)
EPOCHS = 8  # of a language model on the labelled examples' texts
LEAST = 20  # steps, at least


def tuned(general: str, data: LabelledData, labels: int, seed: int, out: Path, options: list[str]) -> None:
    """A language model in ``out``, tuned to the texts of the labelled examples that a classifier will see."""
    texts = [text for text, _ in labelled(data)[0]]
    path = out.with_suffix(".txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(" ".join(texts[i].split()) for i in sample(len(texts), labels, seed)), encoding="utf-8")
    units = sum(len(text.split()) + 1 for text in read_texts(str(path)))
    rows = min(32, max(2, units // 1000))
    steps = max(LEAST, EPOCHS * units // (rows * 70))
    command = [sys.executable, "-m", "glomo", "lm", "train", "lm-lstm-target", "--out", str(out)]
    command += ["--tune.init", general, "--data.text", str(path), "--data.vocabulary", "init", *options]
    command += ["--train.batch_size", str(rows), "--train.steps", str(steps), "--train.eval_every", "0"]
    subprocess.run([*command, "--train.seed", str(seed)], check=True, stdout=subprocess.DEVNULL)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--general", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="compare-trec")
    parser.add_argument("--labels", type=int, nargs="+", default=[50, 100, 500, 2000, 0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given, rest = parser.parse_known_args(argv)
    supervised = given.out / "lm" / "{labels}-{seed}"
    ways = (
        f"scratch: full {SCRATCH}",
        f"general: gradual-unfreeze --tune.init '{given.general}'",
        f"supervised: gradual-unfreeze --tune.init '{supervised}'",
        "semi-supervised: gradual-unfreeze",
    )
    options = {
        **{"data.valid": "0", "tune.init": given.target, "tune.stage_steps": "50", "train.steps": "600"},
        **{"train.batch_size": "32", "train.eval_every": "0", "train.threads": str(given.threads)},
        **split_arguments(rest).options,
    }
    config = load_recipe(given.recipe, options, CompareConfig, "compare")
    config = dataclasses.replace(config, compare=Ways(ways, given.seeds, tuple(given.labels)))
    for labels in given.labels:
        for seed in range(config.train.seed, config.train.seed + given.seeds):
            folder = given.out / "lm" / f"{labels or 'all'}-{seed}"
            tuned(given.general, config.data, labels, seed, folder, ["--train.threads", str(given.threads)])
    results = compare(config, given.out / "runs")
    print(table(results))
    plots.low_shot(results, given.out / "low-shot.png")


if __name__ == "__main__":
    main(sys.argv[1:])
