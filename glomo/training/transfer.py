"""Transfer: a model of the target task, with a learned graph and with the controls it must be compared to.

Every graph of ``compare.graphs`` is trained with every seed; runs of one seed share the labelled examples and the order
of the batches, so that differences between graphs can be taken seed by seed (paired).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glomo.data import AnyVocabulary, BucketBatches
from glomo.errors import UserError
from glomo.nn import BandGraph, FrozenGraph, GLoMoConfig, MatchGraph, NoGraph, TunedGraph, UniformGraph, random_graph
from glomo.nn.baselines import GraphSource
from glomo.training.checkpoint import replace_file
from glomo.training.comparison import Run, compare
from glomo.training.config import default_values, to_dict
from glomo.training.distributed import World
from glomo.training.loop import Task, set_up, train
from glomo.training.models import graph_fingerprint, load_graph
from glomo.training.run_folder import MAY_CHANGE, RunFolder
from glomo.training.targets import make_target, own_vocabulary
from glomo.training.targets.contextual import encoder_fingerprint
from glomo.training.targets.target import Setting, Target, statistics
from glomo.training.texts import sample
from glomo.training.train_config import schedule_of
from glomo.training.transfer_config import TransferConfig
from glomo.training.tune import make_stages
from glomo.transfer.stages import Stage

# of a random graph where no learned one says its sizes
SMALL = GLoMoConfig(dim=128, layers=2, heads=4, head_dim=32, conv_blocks=2, scaled=True)


def transfer(config: TransferConfig, out: Path) -> dict[str, Any]:
    """Run a recipe: all graphs with all seeds. Returns what `compare` makes of them (it is in ``out/results.json``).

    A call that was interrupted goes on where it stopped. Raises UserError for mistakes in the recipe and in the data.
    """
    if "learned" in config.compare.graphs and not config.graph.path:
        raise UserError("the learned graph needs --graph.path DIR, the folder of a `glomo pretrain` run")
    if config.tune.init:
        raise UserError("tune.init is the language model of `glomo finetune`; a graph is named by graph.path")
    if config.graph.rate and not config.tune.plain:
        raise UserError("graph.rate needs tune.method full, tune.factor 1 and no tune.rates: it is the only rate apart")
    if config.graph.rate and config.train.shard:
        raise UserError("train.shard cannot divide a graph that learns; graph.rate needs train.shard false")
    world = set_up(config.train)
    may_change = (*MAY_CHANGE, "compare.graphs", "compare.seeds")
    learned = load_graph(config.graph.path) if config.graph.path else None
    vocabulary: AnyVocabulary
    if learned is not None:
        vocabulary, settings = learned.vocabulary, learned.config
        learned.cut = config.graph.cut
    else:
        vocabulary = own_vocabulary(config)
        settings = dataclasses.replace(SMALL, vocab_size=len(vocabulary))
    fingerprints = {name: graph_fingerprint(learned, name) for name in ("learned", "random") if learned is not None}
    encoder = {"encoder": encoder_fingerprint(config.features)} if config.features.kind == "contextual" else {}
    target = make_target(config, vocabulary)
    seeds = range(config.train.seed, config.train.seed + config.compare.seeds)
    for seed in seeds:  # all of them before anything is trained
        target.check(sample(len(target), config.data.labels, seed), seed)
    if world.rank == 0:
        counts = ", ".join(f"{what}: {number:,}" for what, number in target.counts.items() if number)
        print(f"transfer: {counts}", file=sys.stderr)
    defaults = default_values(config)
    with RunFolder(out, to_dict(config), may_change, defaults) if world.rank == 0 else nullcontext():
        runs = []
        for seed in seeds:
            for name in config.compare.graphs:
                graph = _graph(name, config, learned, settings, vocabulary, seed)
                of = {**encoder, **({"graph": fingerprints[name]} if name in fingerprints else {})}
                runs.append(run(config, target, name, graph, of, seed, out, world))
        found = compare(runs, target.measures[0])
        results = {"task": config.data.dataset or config.data.train, "counts": dict(target.counts), **found}
        if world.rank == 0:
            replace_file(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        return results


def run(
    config: TransferConfig,
    target: Target,
    name: str,
    graph: GraphSource,
    identity: dict[str, str],
    seed: int,
    out: Path,
    world: World,
) -> Run:
    """Train one model on one graph with one seed, in the folder ``out/<name>-<seed>``, and test it. A run that is taken
    up again must be on a graph and an encoder of the same `identity`."""
    device = world.device
    if config.graph.rate and isinstance(graph, FrozenGraph):
        graph = TunedGraph(graph.graph_predictor, graph.vocabulary, graph.cut)
    if isinstance(graph, nn.Module):
        graph.to(device)
    trial = target.trial(Setting(config, graph, sample(len(target), config.data.labels, seed), seed, device))

    def loss(indices: list[int], generator: torch.Generator) -> tuple[Tensor, int, int]:
        return trial.loss(indices)

    sections = {**to_dict(config), "run": {"graph": name, "seed": seed}}
    task = Task(
        nn.ModuleDict({"graph": graph, "task": trial.model}) if isinstance(graph, TunedGraph) else trial.model,
        BucketBatches(trial.lengths, config.train.batch_size, seed),
        loss,
        trial.test,
        {**target.meta, "config": sections},
        # 1: before there were other tasks than texts
        {"layout of the weights": "2", "task": target.fingerprint, **identity},
        f"{name}, seed {seed}",
    )
    settings = dataclasses.replace(config.train, seed=seed)
    if isinstance(graph, TunedGraph):
        rates = {"task": settings.lr, "graph": settings.lr * config.graph.rate}
        task.groups = {"task": r"task\..+", "graph": r"graph\..+"}
        task.stages = lambda groups: [Stage("all", settings.steps, rates, schedule_of(settings), 0, settings.steps)]
    elif not config.tune.plain:
        task.groups = trial.patterns
        task.stages = make_stages(config.tune, settings, len(task.batches))
    may_change = (*MAY_CHANGE, "compare.graphs", "compare.seeds", "train.seed")
    if world.rank:
        row = train(task, settings, None, world)
    else:
        with RunFolder(out / f"{name}-{seed}", sections, may_change, default_values(config)) as folder:
            row = train(task, settings, folder, world)
    share_zero, share_dead = statistics(graph, target.test_ids, device)
    figures = {name: row[name] for name in target.measures}
    return Run(name, seed, figures, share_zero, share_dead, row["seconds"], dict(trial.counts))


def _graph(
    name: str, config: TransferConfig, learned: FrozenGraph | None, settings: GLoMoConfig, vocabulary: Any, seed: int
) -> GraphSource:
    if name == "learned":
        assert learned is not None
        return learned
    if name == "random":
        return random_graph(settings, vocabulary, seed, config.graph.cut)
    if name == "band":
        return BandGraph(config.graph.band)
    controls: dict[str, type[UniformGraph] | type[MatchGraph] | type[NoGraph]]
    controls = {"uniform": UniformGraph, "match": MatchGraph, "none": NoGraph}
    return controls[name]()
