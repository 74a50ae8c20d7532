"""Several ways of training beside each other: equal steps, equal seeds, each run in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from glomo.errors import UserError
from glomo.training.checkpoint import replace_file
from glomo.training.config import check_range, default_values, dump_toml, load_recipe, nearest, split_arguments, to_dict
from glomo.training.finetune_config import FinetuneConfig
from glomo.training.language import LanguageConfig, resolved
from glomo.training.loop import Interrupted, stop_signals
from glomo.training.run_folder import MAY_CHANGE, RunFolder
from glomo.training.translation import TranslationConfig
from glomo.training.tune import METHODS
from glomo.transfer.signal import transfer_effect


@dataclass(frozen=True)
class Ways:
    """The [compare] section: what is compared, and how often."""

    ways: tuple[str, ...] = METHODS
    """each a tune.method (of translators "full"), with options behind it and a name before it where they are wanted,
    as in "at 2.6: full --tune.factor 2.6". In an option {labels} and {seed} are those of the run, {tune.init} and every
    other key that of the recipe, {out} the comparison's folder: {out}/full-{labels}-{seed} is the run of an earlier way
    (its name with "-" for all but letters, digits and dots), as a teacher or to start from"""
    seeds: int = 3
    """runs of each, with the seeds train.seed, train.seed + 1, ..."""
    labels: tuple[int, ...] = ()
    """of classifiers: numbers of labelled examples (0: all), each with every way and seed; none: data.labels"""
    of: Literal["finetune", "lm", "translate"] = "finetune"
    """what is trained: classifiers, judged by their test error; language models or translators, by their validation
    loss in nats a unit (ways with other units cannot be compared by it)"""

    def __post_init__(self) -> None:
        check_range("compare.seeds", self.seeds, 1)
        for number in self.labels:
            check_range("compare.labels", number, 0)
        if self.labels and self.of != "finetune":
            raise UserError(f"compare.labels is {self.labels}, and compare.of {self.of!r}, which has no labels")
        if not self.ways:
            raise UserError(f"compare.ways is empty; at least one of {', '.join(METHODS)} is needed")
        names = [way.name for way in self.parsed()]
        for place, name in enumerate(names):
            same = [other for other in names[:place] if slug(other) == slug(name)]
            if same:
                raise UserError(f"compare.ways has {same[0]!r} and {name!r}, whose folders would be one; rename one")

    def parsed(self) -> list[Way]:
        return [_parsed(text, ("full",) if self.of == "translate" else METHODS) for text in self.ways]


@dataclass(frozen=True)
class Way:
    """One way of fine-tuning."""

    name: str
    options: dict[str, str]
    """{"tune.method": ..., and what else differs from the recipe}"""


@dataclass(frozen=True)
class CompareConfig(FinetuneConfig):
    """A recipe of `glomo compare`: one of `glomo finetune` with a section more."""

    compare: Ways = field(default_factory=Ways)


@dataclass(frozen=True)
class CompareLanguageConfig(LanguageConfig):
    """One of `glomo lm train` with that section."""

    compare: Ways = field(default_factory=lambda: Ways(of="lm"))


@dataclass(frozen=True)
class CompareTranslationConfig(TranslationConfig):
    """One of `glomo translate train` with that section."""

    compare: Ways = field(default_factory=lambda: Ways(("full",), of="translate"))


AnyConfig = FinetuneConfig | LanguageConfig | TranslationConfig
AnyCompareConfig = CompareConfig | CompareLanguageConfig | CompareTranslationConfig
SCHEMAS: dict[str, type[AnyCompareConfig]] = {
    "finetune": CompareConfig,
    "lm": CompareLanguageConfig,
    "translate": CompareTranslationConfig,
}
RUNS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "finetune": (FinetuneConfig, ("finetune",)),
    "lm": (LanguageConfig, ("lm", "train")),
    "translate": (TranslationConfig, ("translate", "train")),
}
"""What a run's recipe is made of, and the command that trains it."""


def compare(config: AnyCompareConfig, out: Path) -> dict[str, Any]:
    """Run a recipe. Returns what `summary` makes of the runs (it is in ``out/results.json``, with pictures beside it);
    a call that was interrupted goes on where it stopped.

    Raises UserError for mistakes in the recipe and in the data, `Interrupted` after Ctrl-C or SIGTERM.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("`glomo compare` runs alone: its figures are seconds and memory of one process")
    sections, of = to_dict(config), config.compare.of
    for key in (key for key in ("valid_units", "valid_pairs") if sections["data"].get(key) == 0):
        raise UserError(f"data.{key} is 0; ways of {of} are compared by their validation, which needs at least 1")
    schema, command = RUNS[of]
    plain = {name: content for name, content in sections.items() if name != "compare"}
    seeds = range(config.train.seed, config.train.seed + config.compare.seeds)
    may_change = {*MAY_CHANGE, "compare.ways", "compare.seeds", "compare.labels"} - {"train.steps"}
    with RunFolder(out, sections, may_change, default_values(config)):
        recipe = out / "recipe.toml"
        replace_file(recipe, dump_toml(plain).encode())
        planned = [
            (way, labels, seed)
            for labels in config.compare.labels or (sections["data"].get("labels", 0),)
            for seed in seeds
            for way in config.compare.parsed()
        ]
        known = {"out": str(out.resolve())}
        known |= {
            f"{name}.{key}": str(value)
            for name, content in plain.items()
            for key, value in content.items()
            if not isinstance(value, list)
        }
        options = [_options(*one, known, of) for one in planned]
        configs = [load_recipe(str(recipe), one, schema, command[0]) for one in options]  # before anything is trained
        runs = []
        for (way, labels, seed), given, one in zip(planned, options, configs, strict=True):
            found = _run(one, command, recipe, given, out / _folder(way.name, labels, seed))
            runs.append({"way": way.name, "labels": labels, "seed": seed, **found})
            replace_file(out / "results.json", _json(summary(_task(sections["data"]), runs)))
        return summary(_task(sections["data"]), runs)


def summary(task: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"task", "measure", "scale", "runs", "ways"}: for each way and number of labels the mean and standard deviation
    (None for one seed) of the "error" (of which `scale` times is the measure), the means of trainable parameters,
    seconds and memory, and the `effect` against the first way of the same labels, seed by seed: the fields of
    `TransferEffect`, where `gain` is how much smaller the error is (None for the first way, and with fewer than 2
    seeds). Where all its runs have unseen classes, "zero_shot" has {figure: (mean, standard deviation)} of
    `NamedTask.figures`."""
    ways = []
    for name, labels in dict.fromkeys((run["way"], run["labels"]) for run in runs):
        of = [run for run in runs if (run["way"], run["labels"]) == (name, labels)]
        error, std = _spread([_error(run) for run in of])
        memory = [run["memory"] for run in of if run["memory"] is not None]
        ways.append(
            {
                "way": name,
                "labels": labels,
                "error": error,
                "std": std,
                "trainable": of[0]["trainable"],
                "parameters": of[0]["parameters"],
                "seconds": statistics.fmean(run["seconds"] for run in of),
                "memory": statistics.fmean(memory) if memory else None,
                "seeds": len(of),
                "examples": round(statistics.fmean(run["examples"] for run in of)),
                "effect": _effect(of, [run for run in runs if (run["way"], run["labels"]) == (runs[0]["way"], labels)]),
            }
        )
        if all("zero_shot" in run for run in of):
            ways[-1]["zero_shot"] = {name: _spread([run["zero_shot"][name] for run in of]) for name in ZERO_SHOT}
    measure, scale = ("test error %", 100.0) if "test_accuracy" in runs[0] else ("validation loss", 1.0)
    return {"task": task, "measure": measure, "scale": scale, "runs": list(runs), "ways": ways}


def _error(run: Mapping[str, Any]) -> float:
    """The test error of a classifier, the validation loss of all else."""
    if "test_accuracy" in run:
        return 1.0 - run["test_accuracy"]
    if "valid_loss" not in run:
        raise UserError(f"the run of {run['way']!r} has no validation, by which it is compared")
    return float(run["valid_loss"])


def _effect(way: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """`transfer_effect` of a way's runs against those of the first, of the seeds that both have."""
    errors = [{run["seed"]: _error(run) for run in runs} for runs in (way, first)]
    seeds = sorted(errors[0].keys() & errors[1].keys())
    if way == first or len(seeds) < 2:
        return None
    one, other = ([of[seed] for seed in seeds] for of in errors)
    return dataclasses.asdict(transfer_effect(one, other, larger_is_better=False))


def table(results: Mapping[str, Any]) -> str:
    """The results as lines to read. With several seeds the last column is how the error differs from the first way's
    (of accuracies in points), with its 95% interval and what that says: "-1.2 (-2.0 to -0.4) helps"."""
    scale = results["scale"]
    places = 1 if scale > 1 else 3
    named = any("zero_shot" in row for row in results["ways"])
    titles = tuple(f"{'zero-shot' if name == 'accuracy' else name} %" for name in ZERO_SHOT) if named else ()
    against = f"against {results['ways'][0]['way']}" if any(row["effect"] for row in results["ways"]) else ""
    rows = [("way", "labels", results["measure"], "learn", "of", "seconds", "memory MB", *titles, against)]
    for row in results["ways"]:
        memory = "" if row["memory"] is None else f"{row['memory'] / 2**20:.0f}"
        error, learn = _with_spread(row["error"], row["std"], scale, places + 1), f"{row['trainable']:,}"
        labels = str(row["labels"] or "all")
        figures = (error, learn, f"{row['parameters']:,}", f"{row['seconds']:.1f}", memory)
        unseen = row.get("zero_shot", {})
        cells = [_with_spread(*unseen[name]) if name in unseen else "" for name in ZERO_SHOT] if named else []
        rows.append((row["way"], labels, *figures, *cells, _difference(row["effect"], scale, places)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _difference(effect: Mapping[str, Any] | None, scale: float, places: int) -> str:
    if effect is None:
        return ""
    found = (-scale * effect[name] for name in ("gain", "high", "low"))
    mean, low, high = (f"{round(value, places) + 0.0:+.{places}f}" for value in found)  # no -0.0
    return f"{mean} ({low} to {high}) {effect['verdict']}"


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation), which one value has none of."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _with_spread(mean: float, spread: float | None, scale: float = 100.0, places: int = 2) -> str:
    return f"{scale * mean:.{places}f}" + ("" if spread is None else f" ± {scale * spread:.{places}f}")


def curves(results: Mapping[str, Any], out: Path) -> dict[str, dict[int, list[float]]]:
    """{way: {step: validation errors, or losses, of its runs}}, of the last number of labels."""
    found: dict[str, dict[int, list[float]]] = {}
    last = results["runs"][-1]["labels"]
    for run in results["runs"]:
        if run["labels"] != last:
            continue
        path = out / _folder(run["way"], run["labels"], run["seed"]) / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "valid_loss" in row:
                error = 1 - row["valid_accuracy"] if "valid_accuracy" in row else row["valid_loss"]
                found.setdefault(run["way"], {}).setdefault(row["step"], []).append(error)
    return found


EQUAL = (
    *("train.steps", "train.batch_size", "train.batch_tokens", "train.seed"),
    *("data.labels", "data.valid", "data.valid_units", "data.valid_pairs", "data.max_length", "data.swap"),
    *("names.unseen", "names.held_out"),
)
"""What no way may change: the budget, and which examples it is spent on."""
ZERO_SHOT = ("accuracy", "chance", "seen", "unseen", "harmonic")
"""What is told of the classes that no run was trained on."""


def _parsed(text: str, methods: Sequence[str]) -> Way:
    name, colon, rest = text.partition(":")
    try:
        words = shlex.split(rest if colon else text)
        arguments = split_arguments(words)
    except (ValueError, UserError) as error:
        raise UserError(f"compare.ways has {text!r}, which cannot be read: {error}") from None
    if len(arguments.positional) != 1 or arguments.positional[0] not in methods:
        given = " ".join(arguments.positional)
        raise UserError(f"compare.ways has {text!r}: {given or 'nothing'!r} is no method{nearest(given, methods)}")
    for key in arguments.options:
        if key in EQUAL:
            raise UserError(f"compare.ways has {text!r}, but {key} must be equal for all ways")
    options = {"tune.method": arguments.positional[0], **arguments.options}
    return Way(name.strip() if colon else " ".join(words), options)


def _options(way: Way, labels: int, seed: int, known: Mapping[str, str], of: str = "finetune") -> dict[str, str]:
    """A run's options, with what stands in braces and is known replaced."""
    known = {"labels": str(labels or "all"), "seed": str(seed), **known}
    options = {
        name: re.sub(r"\{([a-z_.]+)\}", lambda found: known.get(found[1], found[0]), value)
        for name, value in way.options.items()
    }
    if of == "translate":
        options.pop("tune.method")  # there is one only
    return {**options, "train.seed": str(seed), **({"data.labels": str(labels)} if of == "finetune" else {})}


def _folder(way: str, labels: int, seed: int) -> str:
    return f"{slug(way)}-{labels or 'all'}-{seed}"


def _run(
    config: AnyConfig, command: Sequence[str], recipe: Path, options: Mapping[str, str], folder: Path
) -> dict[str, Any]:
    """The results of one run: trained now, gone on with, or read back."""
    results = folder / "results.json"
    if results.exists():
        # of the same configuration, or a sentence
        made = config if isinstance(config, TranslationConfig) else resolved(config)
        with RunFolder(folder, to_dict(made), defaults=default_values(config)):
            found = json.loads(results.read_bytes())
        if found["budget"] == config.train.steps:
            return dict(found)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    line = [sys.executable, "-m", "glomo", *command, str(recipe), "--out", str(folder), *words]
    print(f"{folder.name}:", file=sys.stderr, flush=True)
    with stop_signals() as stopped_by, subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        told = False
        while (code := process.poll()) is None:
            if stopped_by and not told:  # the child saves, and ends; of SIGINTs it would bear the terminal's alone
                told = True
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    if stopped_by or code in (130, 143):
        code = 128 + stopped_by[0] if stopped_by else code
        raise Interrupted(f"stopped in {folder}; the same command goes on from there", code)
    if code:
        raise UserError(f"the run in {folder} ended with the code {code}, for the reason above")
    return dict(json.loads(results.read_bytes()))


def _task(data: Mapping[str, Any]) -> str:
    files = [data["train"]] if "train" in data else [*data.get("text", ()), *data.get("pairs", ())]
    return Path(files[0]).name if files and files[0] else str(data["dataset"])


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
