"""`python -m bench.forgetting --general RUN --out DIR [--new movie-sentiment] [--old wikitext-2] [--seeds 3]`: what a
language model of --old (`glomo lm train lm-lstm-small`) forgets while it is tuned to the texts of --new, in its own
vocabulary, with nothing that keeps it near, with L2-SP, and with EWC: perplexity of both test splits.

A call that was stopped goes on; DIR/forgetting.png is the picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from glomo.data import catalogue
from glomo.training.checkpoint import replace_file
from glomo.training.language_model import load_language_model

WAYS = {
    "free": "",
    "L2-SP, 0.0001": "--close.method l2-sp --close.strength 1e-4 --close.beta 1e-4",
    "L2-SP, 0.001": "--close.method l2-sp --close.strength 1e-3 --close.beta 1e-3",
    "L2-SP, 0.01": "--close.method l2-sp --close.strength 1e-2 --close.beta 1e-2",
    "EWC, 10": "--close.method ewc --close.strength 10",
    "EWC, 100": "--close.method ewc --close.strength 100",
    "EWC, 1000": "--close.method ewc --close.strength 1000",
}
Perplexities = dict[str, float]


def perplexities(folder: Path | str, names: list[str]) -> Perplexities:
    """{data set: perplexity a unit of its test split}."""
    model = load_language_model(folder)
    return {name: model.perplexity(catalogue.load_texts(name, "test"))["perplexity"] for name in names}


def tuned(way: str, seed: int, given: argparse.Namespace) -> Perplexities:
    """What comes of one run, trained now or read back."""
    folder = given.out / f"{way.replace(', ', '-')}-{seed}"
    found = folder / "perplexities.json"
    if not found.exists():
        command = [sys.executable, "-m", "glomo", "lm", "train", "lm-lstm-target", "--out", str(folder)]
        command += ["--tune.init", given.general, "--data.vocabulary", "init", "--data.dataset", given.new]
        command += ["--train.seed", str(seed), "--train.threads", str(given.threads), "--train.eval_every", "0"]
        command += [*WAYS[way].split(), *(["--close.dataset", given.old] if "ewc" in WAYS[way] else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        replace_file(found, json.dumps(perplexities(folder, [given.old, given.new])).encode())
    return dict(json.loads(found.read_bytes()))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--general", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--new", default="movie-sentiment")
    parser.add_argument("--old", default="wikitext-2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    given = parser.parse_args(argv)
    before = perplexities(given.general, [given.old, given.new])
    print(f"{'perplexity of':<22}" + " ".join(f"{name:>20}" for name in before))
    print(f"{'before':<22}" + " ".join(f"{value:>20.1f}" for value in before.values()))
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    axis.scatter(before[given.old], before[given.new], marker="*", s=120, color="black", label="before")
    for way in given.ways:
        runs = [tuned(way, seed, given) for seed in range(given.seeds)]
        of = {name: [run[name] for run in runs] for name in (given.old, given.new)}
        print(f"{way:<22}" + " ".join(f"{spread(of[name]):>20}" for name in of), flush=True)
        axis.plot(of[given.old], of[given.new], "o", alpha=0.7, label=way)
    axis.set_xlabel(f"perplexity of {given.old}, the old text")
    axis.set_ylabel(f"perplexity of {given.new}, the new text")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(given.out / "forgetting.png", dpi=150)


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main(sys.argv[1:])
