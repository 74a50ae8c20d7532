"""Transfer: a classifier on the target task, with a learned graph and with the controls it must be compared to.

Every graph of ``compare.graphs`` is trained with every seed; runs of one seed share the labelled examples and the order
of the batches, so that differences between graphs can be taken seed by seed (paired).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.data import BucketBatches, Vocabulary, encode_labels, label_names, pad
from glomo.errors import UserError
from glomo.nn import BandGraph, FrozenGraph, GLoMoConfig, NoGraph, UniformGraph, random_graph
from glomo.nn.baselines import GraphSource
from glomo.training.checkpoint import replace_file
from glomo.training.classifier import TextClassifier
from glomo.training.comparison import Run, compare
from glomo.training.config import check_range, default_values, nearest, to_dict
from glomo.training.distributed import World
from glomo.training.graph_cache import GraphCache
from glomo.training.loop import Task, set_up, train
from glomo.training.models import load_graph
from glomo.training.run_folder import MAY_CHANGE, RunFolder
from glomo.training.texts import Labelled, LabelledData, labelled, sample
from glomo.training.train_config import TrainConfig
from glomo.training.tune import Tune, make_stages

GRAPHS = ("none", "uniform", "band", "random", "learned")
# of a random graph where no learned one says its sizes
SMALL = GLoMoConfig(dim=128, layers=2, heads=4, head_dim=32, conv_blocks=2, scaled=True)
STATISTICS_TEXTS = 64  # zeros and dead rows are counted on so many test texts


@dataclass(frozen=True)
class TransferData(LabelledData):
    """The [data] section: the labelled task."""

    length: int = 100
    """units after which a text is cut"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("data.length", self.length, 1)


@dataclass(frozen=True)
class Features:
    """The [features] section: what the graph is applied to."""

    kind: Literal["learned", "random", "glove-50d"] = "learned"
    """learned embeddings, random ones that stay, or GloVe vectors that stay"""
    dim: int = 64
    """width of learned and random embeddings"""
    states: bool = False
    """apply the graph to the states of a BiGRU over the embeddings"""

    def __post_init__(self) -> None:
        check_range("features.dim", self.dim, 2 if self.states else 1)  # half of the states for each direction


@dataclass(frozen=True)
class GraphOptions:
    """The [graph] section: the learned graph, and how graphs are mixed; see `glomo.nn.GraphTransfer`."""

    path: str = ""
    """run or checkpoint folder of `glomo pretrain`, for the graphs learned and random"""
    mixtures: int = 2
    """mixed graphs per direction"""
    weights: Literal["global", "target"] = "global"
    """one mixture for all units, or one that depends on the target"""
    chains: bool = True
    """mix the running products of the layers' graphs too"""
    layers: Literal["all", "last"] = "all"
    """all, or the last layer alone (an ablation)"""
    fusion: Literal["gate", "concat", "none"] = "gate"
    """of the features with what the graphs bring"""
    band: int = 3
    """width of the graph band"""

    def __post_init__(self) -> None:
        check_range("graph.mixtures", self.mixtures, 1)
        check_range("graph.band", self.band, 1)


@dataclass(frozen=True)
class Head:
    """The [head] section."""

    kind: Literal["pooling", "bigru"] = "pooling"
    """pooling or bigru"""
    hidden: int = 64
    """width"""
    dropout: float = 0.2
    """of embeddings, and of the pooled vector"""

    def __post_init__(self) -> None:
        check_range("head.hidden", self.hidden, 2 if self.kind == "bigru" else 1)  # half of it for each direction
        check_range("head.dropout", self.dropout, 0, 1)


@dataclass(frozen=True)
class Compare:
    """The [compare] section: which graphs, how often."""

    graphs: tuple[str, ...] = GRAPHS
    """of none, uniform, band, random, learned, with commas between"""
    seeds: int = 3
    """runs of each graph, with the seeds train.seed, train.seed + 1, ..."""

    def __post_init__(self) -> None:
        check_range("compare.seeds", self.seeds, 1)
        if not self.graphs:
            raise UserError(f"compare.graphs is empty; at least one of {', '.join(GRAPHS)} is needed")
        for name in self.graphs:
            if name not in GRAPHS:
                raise UserError(f"compare.graphs names {name!r}{nearest(name, GRAPHS)}")


@dataclass(frozen=True)
class TransferConfig:
    """A transfer recipe."""

    data: TransferData = field(default_factory=TransferData)
    features: Features = field(default_factory=Features)
    graph: GraphOptions = field(default_factory=GraphOptions)
    head: Head = field(default_factory=Head)
    compare: Compare = field(default_factory=Compare)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=500, eval_every=0, checkpoint_every=0, keep=1))
    tune: Tune = field(default_factory=Tune)


@dataclass(frozen=True)
class Examples:
    """Texts of the task as the units of the graph's vocabulary: ids for the graph, pieces for the features."""

    ids: list[list[int]]
    pieces: list[list[str]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)


def transfer(config: TransferConfig, out: Path) -> dict[str, Any]:
    """Run a recipe: all graphs with all seeds. Returns what `compare` makes of them (it is in ``out/results.json``).

    A call that was interrupted goes on where it stopped. Raises UserError for mistakes in the recipe and in the data.
    """
    if "learned" in config.compare.graphs and not config.graph.path:
        raise UserError("the learned graph needs --graph.path DIR, the folder of a `glomo pretrain` run")
    if config.tune.init:
        raise UserError("tune.init is the language model of `glomo finetune`; a graph is named by graph.path")
    world = set_up(config.train)
    may_change = (*MAY_CHANGE, "compare.graphs", "compare.seeds")
    train_set, test_set = labelled(config.data)
    classes = label_names(train_set)
    learned = load_graph(config.graph.path) if config.graph.path else None
    if learned is not None:
        vocabulary, settings = learned.vocabulary, learned.config
    else:
        vocabulary = Vocabulary.build((text for text, _ in train_set), 20_000)
        settings = dataclasses.replace(SMALL, vocab_size=len(vocabulary))
    train_examples, test_examples = (
        encode(examples, vocabulary, classes, config.data.length) for examples in (train_set, test_set)
    )
    seeds = range(config.train.seed, config.train.seed + config.compare.seeds)
    for seed in seeds:  # all of them before anything is trained
        drawn = {train_examples.labels[i] for i in sample(len(train_examples), config.data.labels, seed)}
        if len(drawn) < 2:
            raise UserError(
                f"data.labels is {config.data.labels}; the examples drawn with the seed {seed} are all of the class "
                f"{classes[drawn.pop()]!r}, and more are needed"
            )
    defaults = default_values(config)
    with RunFolder(out, to_dict(config), may_change, defaults) if world.rank == 0 else nullcontext():
        runs = []
        for seed in seeds:
            for name in config.compare.graphs:
                graph = _graph(name, config, learned, settings, vocabulary, seed)
                runs.append(run(config, name, graph, seed, train_examples, test_examples, classes, out, world))
        results = {"task": config.data.dataset or config.data.train, **compare(runs)}
        if world.rank == 0:
            replace_file(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        return results


def run(
    config: TransferConfig,
    name: str,
    graph: GraphSource,
    seed: int,
    train_examples: Examples,
    test_examples: Examples,
    classes: Sequence[str],
    out: Path,
    world: World,
) -> Run:
    """Train one classifier on one graph with one seed, in the folder ``out/<name>-<seed>``, and test it."""
    chosen = sample(len(train_examples), config.data.labels, seed)
    words, vectors = feature_table(
        config.features, [train_examples.pieces[i] for i in chosen], test_examples.pieces, seed
    )
    device = world.device
    if isinstance(graph, torch.nn.Module):
        graph.to(device)

    cache = GraphCache(graph, [train_examples.ids[i] for i in chosen], device)

    def tensors(examples: Examples, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        units, lengths = pad([[words.get(piece, 1) for piece in examples.pieces[i]] for i in indices])
        labels = torch.tensor([examples.labels[i] for i in indices])
        return units.to(device), lengths.to(device), labels.to(device)

    torch.manual_seed(seed)
    mixing: dict[str, Any] = {
        "num_mixtures": config.graph.mixtures,
        "weights": config.graph.weights,
        "chains": config.graph.chains,
    }
    mixing |= {"layers": config.graph.layers, "fusion": config.graph.fusion}
    model = TextClassifier(
        vectors,
        config.features.kind == "learned",
        graph,
        len(classes),
        config.features.states,
        config.head.kind,
        config.head.hidden,
        config.head.dropout,
        **mixing,
    )

    def loss(indices: list[int], generator: torch.Generator) -> tuple[Tensor, int, int]:
        units, lengths, labels = tensors(train_examples, [chosen[i] for i in indices])
        return F.cross_entropy(model(units, lengths, cache.batch(indices)), labels), len(indices), int(lengths.sum())

    @torch.no_grad()
    def test() -> dict[str, float]:
        model.eval()
        order = sorted(range(len(test_examples)), key=lambda i: len(test_examples.ids[i]))
        right = 0
        for start in range(0, len(order), 256):
            part = order[start : start + 256]
            units, lengths, labels = tensors(test_examples, part)
            ids, _ = pad([test_examples.ids[i] for i in part])
            graphs = graph.queries_keys(ids.to(device), lengths)
            right += int((model(units, lengths, graphs).argmax(-1) == labels).sum())
        return {"accuracy": right / len(order)}

    sections = {**to_dict(config), "run": {"graph": name, "seed": seed}}
    task = Task(
        model,
        BucketBatches([len(train_examples.ids[i]) for i in chosen], config.train.batch_size, seed),
        loss,
        test,
        {"kind": "classifier", "classes": list(classes), "config": sections},
        {"task": _fingerprint(train_examples, test_examples)},
        f"{name}, seed {seed}",
    )
    settings = dataclasses.replace(config.train, seed=seed)
    if not config.tune.plain:
        task.groups = model.layer_patterns()
        task.stages = make_stages(config.tune, settings, len(task.batches))
    may_change = (*MAY_CHANGE, "compare.graphs", "compare.seeds", "train.seed")
    if world.rank:
        row = train(task, settings, None, world)
    else:
        with RunFolder(out / f"{name}-{seed}", sections, may_change, default_values(config)) as folder:
            row = train(task, settings, folder, world)
    share_zero, share_dead = statistics(graph, test_examples, device)
    return Run(name, seed, row["accuracy"], share_zero, share_dead, row["seconds"])


def encode(examples: Labelled, vocabulary: Any, classes: Sequence[str], length: int) -> Examples:
    """Texts to units of the graph's vocabulary (at most ``length``), labels to numbers (UserError: unknown)."""
    labels = encode_labels([label for _, label in examples], classes)
    # a text of which nothing is left, were there one, would have no unit to pool
    ids = [vocabulary.encode(text)[:length] or [vocabulary.unk_id] for text, _ in examples]
    pieces = [vocabulary.tokens(text)[:length] or [""] for text, _ in examples]
    return Examples(ids, pieces, labels)


def feature_table(
    features: Features, train_pieces: list[list[str]], test_pieces: list[list[str]], seed: int
) -> tuple[dict[str, int], Tensor]:
    """({piece: row}, vectors): row 0 is padding and row 1 an unknown piece, both zero.

    Learned vectors exist for the pieces of the labelled training texts only; those that stay as they are, for all.
    """
    texts = train_pieces if features.kind == "learned" else train_pieces + test_pieces
    pieces = sorted({piece for text in texts for piece in text})
    if features.kind == "glove-50d":
        known, table = _glove()
        found = [piece for piece in pieces if piece.strip().lower() in known]
        vectors = torch.tensor(table[[known[piece.strip().lower()] for piece in found]])
    else:
        found = pieces
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(len(found), features.dim, generator=generator)
        if features.kind == "learned":
            vectors *= 0.1  # small beside what training adds
    rows = {piece: row for row, piece in enumerate(found, start=2)}
    return rows, torch.cat([vectors.new_zeros(2, vectors.shape[1]), vectors])


def statistics(graph: GraphSource, examples: Examples, device: torch.device) -> tuple[float | None, float | None]:
    """Shares of zero weights and of dead rows in the graph over some test texts; None for no graph."""
    ids, lengths = pad(examples.ids[:STATISTICS_TEXTS])
    lengths = lengths.to(device)
    found = [graphs.statistics(lengths) for graphs in graph.queries_keys(ids.to(device), lengths)]
    if not found:
        return None, None
    pairs, rows = sum(part.pairs for part in found), sum(part.rows for part in found)
    return (
        sum(part.zero_pairs for part in found) / max(pairs, 1),
        sum(part.dead_rows for part in found) / max(rows, 1),
    )


def _graph(
    name: str, config: TransferConfig, learned: FrozenGraph | None, settings: GLoMoConfig, vocabulary: Any, seed: int
) -> GraphSource:
    if name == "learned":
        assert learned is not None
        return learned
    if name == "random":
        return random_graph(settings, vocabulary, seed)
    if name == "band":
        return BandGraph(config.graph.band)
    return UniformGraph() if name == "uniform" else NoGraph()


_glove_cache: list[tuple[dict[str, int], Any]] = []


def _glove() -> tuple[dict[str, int], Any]:
    """{word: row} and the table, read once: 400,000 words take seconds."""
    if not _glove_cache:
        from glomo.data.catalogue import load_vectors

        words, table = load_vectors("glove-50d")
        _glove_cache.append(({word: row for row, word in enumerate(words)}, table))
    return _glove_cache[0]


def _fingerprint(*parts: Examples) -> str:
    return hashlib.sha256(repr([(part.ids, part.pieces, part.labels) for part in parts]).encode()).hexdigest()
