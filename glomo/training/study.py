"""A study: graphs that were pre-trained in several ways, and controls, beside each other on target tasks.

Every variant is one change of a pre-training recipe, of a transfer recipe, or of both. All runs of a seed share the
labelled examples and the order of the batches, so that differences to the first variant are taken seed by seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glomo.errors import UserError
from glomo.training.checkpoint import replace_file
from glomo.training.compare import slug
from glomo.training.comparison import mean, spread
from glomo.training.config import (
    check_range,
    default_values,
    load_recipe,
    nearest,
    recipe_path,
    split_arguments,
    to_dict,
)
from glomo.training.loop import Interrupted, stop_signals
from glomo.training.models import graph_fingerprint, load_graph
from glomo.training.pretrain import PretrainConfig
from glomo.training.run_folder import MAY_CHANGE, RunFolder
from glomo.training.targets.contextual import encoder_fingerprint
from glomo.training.transfer_config import GRAPHS, TransferConfig

GRAPHS_FOLDER = "graphs"
RESERVED = (
    "pretrain.train.seed",
    *(f"transfer.{key}" for key in ("train.seed", "compare.seeds", "compare.graphs", "graph.path")),
)


@dataclass(frozen=True)
class Study:
    """The [study] section."""

    pretrain: str = ""
    """the recipe of `glomo pretrain` (a name or a file) that variants change"""
    graph: str = ""
    """a graph that is there already (a run's folder, or the name of one that comes with the package), in the place of
    study.pretrain"""
    transfer: tuple[str, ...] = ()
    """recipes of `glomo transfer`, with commas between, each a task that every variant is tried on"""
    variants: tuple[str, ...] = ("learned: learned", *(f"{name}: {name}" for name in GRAPHS if name != "learned"))
    """each a name, a colon, a graph (none, uniform, band, match, random, learned), and what it changes of the recipes:
    "softmax: learned --pretrain.model.activation softmax", "last layer: learned --transfer.graph.layers last". The
    first is what all others are compared to"""
    every: str = ""
    """changes for all variants, as behind a variant's graph; a variant's own come after them"""
    seeds: int = 5
    """runs of each variant on each task, with the seeds 0, 1, ..."""
    graphs: int = 1
    """pre-trainings of each learned graph, with the seeds 0, 1, ...: run s takes the graph s modulo this number"""
    jobs: int = 1
    """runs at a time, each in a process of its own, with an equal share of the processors unless OMP_NUM_THREADS is
    set"""

    def __post_init__(self) -> None:
        check_range("study.seeds", self.seeds, 1)
        check_range("study.graphs", self.graphs, 1)
        check_range("study.jobs", self.jobs, 1)
        names = [slug(variant.name) for variant in self.parsed()]
        for name in names:
            if not name:
                raise UserError("study.variants has a name without a letter or digit of ASCII; its folder needs one")
            if names.count(name) > 1:
                raise UserError(f"study.variants has two whose folder would be {name!r}; rename one")

    def parsed(self) -> list[Variant]:
        if not self.variants:
            raise UserError("study.variants is empty; at least one is needed")
        return [_parsed(text, self.every) for text in self.variants]


@dataclass(frozen=True)
class Variant:
    name: str
    graph: str
    pretrain: dict[str, str]
    """what it changes of the pre-training recipe"""
    transfer: dict[str, str]
    """what it changes of the transfer recipes"""


@dataclass(frozen=True)
class StudyConfig:
    """A recipe of `glomo study`."""

    study: Study = field(default_factory=Study)


def _parsed(text: str, every: str) -> Variant:
    name, colon, rest = text.partition(":")
    try:
        own = split_arguments(shlex.split(rest if colon else text))
        for_all = split_arguments(shlex.split(every))
    except (ValueError, UserError) as error:
        raise UserError(f"study.variants has {text!r}, which cannot be read: {error}") from None
    graphs = [*own.positional, *for_all.positional]
    if len(graphs) != 1 or graphs[0] not in GRAPHS:
        given = " ".join(graphs)
        raise UserError(f"study.variants has {text!r}: {given or 'nothing'!r} is no graph{nearest(given, GRAPHS)}")
    changes: dict[str, dict[str, str]] = {"pretrain": {}, "transfer": {}}
    for key, value in {**for_all.options, **own.options}.items():
        recipe, _, rest = key.partition(".")
        if f"{recipe}.{rest}" in RESERVED:
            raise UserError(f"study.variants has {text!r}: {rest} is what the study itself sets")
        if recipe not in changes or not rest:
            raise UserError(f"study.variants has {text!r}: --{key} is neither --pretrain. nor --transfer.")
        changes[recipe][rest] = value
    if changes["pretrain"] and graphs[0] != "learned" and "--pretrain." in text:
        raise UserError(f"study.variants has {text!r}, but --pretrain. is of the graph learned")
    return Variant(name.strip(), graphs[0], changes["pretrain"], changes["transfer"])


@dataclass(frozen=True)
class Job:
    """One run: what is typed behind ``glomo``, and the folder it goes to."""

    words: tuple[str, ...]
    folder: Path
    says: Mapping[str, Any]
    """what of its configuration decides its results, but for where the study is"""

    @property
    def stamp(self) -> Path:
        return self.folder.with_name(self.folder.name + ".done")

    @property
    def done(self) -> bool:
        """Whether it has ended well before, with the configuration that it would have now."""
        return self._says(self.stamp)

    def begin(self) -> None:
        """Make its folder ready; what a run of another configuration has left there goes."""
        begun = self.stamp.with_suffix(".begun")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if not self._says(begun):
            self.stamp.unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            replace_file(begun, json.dumps(self.says).encode())

    def end(self) -> None:
        """After it has ended well."""
        replace_file(self.stamp, json.dumps(self.says).encode())

    def _says(self, file: Path) -> bool:
        """Whether a stamp says the same; an option that is newer than the stamp had its default."""
        try:
            noted = json.loads(file.read_bytes())
        except (FileNotFoundError, ValueError):
            return False
        usual = {**_says("pretrain", PretrainConfig()), **_says("transfer", TransferConfig())}
        return {**{key: value for key, value in usual.items() if key in self.says}, **noted} == self.says


def study(config: StudyConfig, out: Path) -> dict[str, Any]:
    """Run a recipe. Returns what `summary` makes of the runs; it is in ``out/results.json``, which while they go on has
    those that have ended. They are not run again: a call that was interrupted goes on where it stopped.

    Raises UserError for mistakes in the recipes, before anything is trained, and for runs that fail.
    """
    given = config.study
    if not (given.pretrain or given.graph) or not given.transfer:
        raise UserError("the study names no recipes: study.pretrain (or study.graph) and study.transfer are needed")
    if given.graph and (given.pretrain or given.graphs > 1 or any(v.pretrain for v in given.parsed())):
        raise UserError(f"study.graph is {given.graph}, which is there already: nothing of it is pre-trained")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("`glomo study` runs alone; study.jobs says how many of its runs go at a time")
    variants = given.parsed()
    tasks = {recipe_path(name).stem: str(recipe_path(name).resolve()) for name in given.transfer}
    if GRAPHS_FOLDER in tasks:
        raise UserError(f"a recipe of study.transfer is called {GRAPHS_FOLDER}, as the folder of graphs is; rename it")
    if len(tasks) < len(given.transfer):
        raise UserError("study.transfer names two recipes of one name; rename one file")
    may_change = (*MAY_CHANGE, *(f"study.{key}" for key in ("seeds", "jobs", "variants", "transfer")))
    with RunFolder(out, to_dict(config), may_change, default_values(config)):
        first = next((variant for variant in variants if variant.graph == "learned"), variants[0])
        graphs = {}
        for variant in variants:
            for number in range(given.graphs):
                # controls take the vocabulary (and a random graph its sizes) of the first learned graph
                changes = (variant if variant.graph == "learned" else first).pretrain
                if given.graph:
                    graphs[variant.name, number] = _existing(given.graph, variant.graph)
                else:
                    graphs[variant.name, number] = _pretraining(given.pretrain, changes, number, out)
        runs = {
            (task, variant.name, seed): _transfer(
                path, variant, seed, graphs[variant.name, seed % given.graphs], out / task
            )
            for seed in range(given.seeds)
            for task, path in tasks.items()
            for variant in variants
        }
        if not given.graph:
            _do(list({job.folder: job for job in graphs.values()}.values()), given.jobs)
        losses = {name: [_valid_loss(graphs[name, n].folder) for n in range(given.graphs)] for name, _ in graphs}

        def note() -> dict[str, Any]:
            found = [
                {"task": task, "variant": name, "seed": seed, **_result(job.folder)}
                for (task, name, seed), job in runs.items()
                if job.done and runs[task, variants[0].name, seed].done  # differences are to the first
            ]
            results = summary(found, {v.name: losses[v.name] if v.graph == "learned" else [] for v in variants})
            replace_file(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
            return results

        _do(list(runs.values()), given.jobs, note)
        return note()


def summary(runs: Sequence[Mapping[str, Any]], losses: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """{"runs", "losses", "tasks": {task: {"measure", "rows"}}}: a row for each variant with mean, sample deviation and
    standard error of the task's measure, of its further figures the means, and the paired "difference" to the first
    variant with its standard error (None for the first, and for single seeds its error). `losses` are the validation
    losses of each variant's graphs."""
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(run["task"] for run in runs):
        of = [run for run in runs if run["task"] == task]
        measure = of[0]["measure"]
        figure = {(run["variant"], run["seed"]): run["figures"][measure] for run in of}
        names = list(dict.fromkeys(run["variant"] for run in of))
        rows = []
        for name in names:
            own = [run for run in of if run["variant"] == name]
            differences = [figure[name, run["seed"]] - figure[names[0], run["seed"]] for run in own]
            rows.append(
                {
                    "variant": name,
                    **spread([run["figures"][measure] for run in own]),
                    "figures": {key: statistics.fmean(run["figures"][key] for run in own) for key in own[0]["figures"]},
                    "difference": None if name == names[0] else spread(differences),
                    "seconds": statistics.fmean(run["seconds"] for run in own),
                    "share_zero": mean([run["share_zero"] for run in own]),
                    "share_dead": mean([run["share_dead"] for run in own]),
                }
            )
        tasks[task] = {"measure": measure, "rows": rows}
    return {"runs": list(runs), "losses": {name: list(values) for name, values in losses.items()}, "tasks": tasks}


def table(results: Mapping[str, Any]) -> str:
    """The results as lines to read: per cent, ± the standard deviation of the seeds; differences ± their standard
    errors; the graph's validation loss in nats a unit."""
    lines = []
    for task, found in results["tasks"].items():
        first = found["rows"][0]["variant"]
        measure = found["measure"].replace("_", " ")
        rows = [("variant", f"{measure} %", f"it - {first}", "seeds", "loss", "zeros %", "dead %", "seconds")]
        for row in found["rows"]:
            losses = [loss for loss in results["losses"].get(row["variant"], ()) if loss is not None]
            rows.append(
                (
                    row["variant"],
                    _percent(row["mean"], row["std"]),
                    _percent(row["difference"]["mean"], row["difference"]["error"], "+") if row["difference"] else "",
                    str(row["count"]),
                    f"{statistics.fmean(losses):.3f}" if losses else "",
                    "" if row["share_zero"] is None else f"{100 * row['share_zero']:.0f}",
                    "" if row["share_dead"] is None else f"{100 * row['share_dead']:.1f}",
                    f"{row['seconds']:.0f}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        cells = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [task, cells[0], "-" * len(cells[0]), *cells[1:], ""]
    return "\n".join(lines).rstrip()


def _percent(mean: float, error: float | None, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _pretraining(recipe: str, changes: Mapping[str, str], seed: int, out: Path) -> Job:
    options = {**changes, "train.seed": str(seed)}
    config = load_recipe(recipe, options, PretrainConfig, "pretrain")  # a mistake is told before anything is trained
    text = " ".join(f"{key} {value}" for key, value in sorted(changes.items()))
    # a slug has no signs, and may be long: a hash tells -1 from 1
    name = f"{slug(text)[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}" if text else "as-it-is"
    folder = out / GRAPHS_FOLDER / f"{name}-{seed}"
    words = ("pretrain", str(recipe_path(recipe).resolve()), "--out", str(folder))
    return Job((*words, *_typed(options)), folder, _says("pretrain", config))


def _existing(graph: str, kind: str) -> Job:
    """No run, but what runs need of one: where the graph is, and what of it the learned graph or a control depends on:
    runs of controls stay when better weights come into its place."""
    return Job((), Path(graph), {"graph": graph_fingerprint(load_graph(graph), kind)})


def _transfer(recipe: str, variant: Variant, seed: int, graph: Job, out: Path) -> Job:
    options = {
        **variant.transfer,
        "graph.path": str(graph.folder),
        "compare.graphs": variant.graph,
        "compare.seeds": "1",
        "train.seed": str(seed),
    }
    config = load_recipe(recipe, {**options, "graph.path": graph.folder.name}, TransferConfig, "transfer")
    folder = out / f"{slug(variant.name)}-{seed}"
    says = {**_says("transfer", config), **graph.says}  # of another graph it is another run
    if config.features.kind == "contextual":
        says["encoder"] = encoder_fingerprint(config.features)
    return Job(("transfer", recipe, "--out", str(folder), *_typed(options)), folder, says)


def _says(recipe: str, config: PretrainConfig | TransferConfig) -> dict[str, Any]:
    no_matter = set(MAY_CHANGE) - {"train.steps"}
    chosen = {
        f"{recipe}.{section}.{key}": value
        for section, options in to_dict(config).items()
        for key, value in options.items()
        if f"{section}.{key}" not in no_matter
    }
    return json.loads(json.dumps(chosen))


def _typed(options: Mapping[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _result(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "results.json").read_bytes())
    (run,) = found["runs"]
    kept = {key: run[key] for key in ("figures", "share_zero", "share_dead", "seconds")}
    return {"measure": found["measure"], **kept}


def _valid_loss(folder: Path) -> float | None:
    """The least validation loss of a pre-training run; None of a graph that comes without its figures."""
    if not (folder / "metrics.jsonl").exists():
        return None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return min((row["valid_loss"] for row in rows if "valid_loss" in row), default=None)


def _do(jobs: Sequence[Job], at_a_time: int, after_each: Callable[[], object] = lambda: None) -> None:
    """Run what has not been done, so many at a time; on a signal or a failure those that run are told to save and end.
    `after_each` is called when one has ended well.

    Raises Interrupted after a signal, UserError for a run that fails.
    """
    waiting = [job for job in jobs if not job.done]
    if not waiting:
        return
    # more threads than processors wait for each other, spinning: two runs of two on two cores take five times as long
    share = max(1, (os.cpu_count() or 1) // at_a_time)
    environment = {"OMP_NUM_THREADS": str(share), **os.environ}
    failed: list[str] = []
    ended = len(jobs) - len(waiting)
    lock = threading.Lock()

    with stop_signals() as stopped_by:

        def run(job: Job) -> None:
            nonlocal ended
            if stopped_by or failed:
                return
            job.begin()
            log = job.folder.with_name(job.folder.name + ".log")
            with log.open("w", encoding="utf-8") as stream:
                line = [sys.executable, "-m", "glomo", *job.words]
                process = subprocess.Popen(line, stdout=stream, stderr=stream, env=environment)
                told = False
                while (code := process.poll()) is None:
                    if (stopped_by or failed) and not told:  # it saves, and ends
                        told = True
                        process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.2)
            with lock:
                if code == 0:
                    job.end()
                    ended += 1
                    print(f"study: {ended} of {len(jobs)}: {job.folder}", file=sys.stderr, flush=True)
                    after_each()
                elif code in (130, 143) and not failed:  # a terminal's Ctrl-C has reached it, and us
                    stopped_by.append(code - 128)
                elif not (stopped_by or failed):
                    said = log.read_text(encoding="utf-8").strip().splitlines()
                    failed.append(f"the run in {job.folder} ended with the code {code}: {said[-1] if said else ''}")

        with ThreadPoolExecutor(at_a_time) as pool:
            list(pool.map(run, waiting))
    if stopped_by:
        raise Interrupted("stopped; the same command goes on from there", 128 + stopped_by[0])
    if failed:
        raise UserError(failed[0])
