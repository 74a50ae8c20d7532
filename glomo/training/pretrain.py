"""GLoMo pre-training: unlabelled text in, a graph (settings, vocabulary, weights) in the run folder out."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from glomo.data import AnyVocabulary, BucketBatches, Windows
from glomo.errors import UserError
from glomo.nn import GLoMo, GLoMoConfig
from glomo.training.config import check_range, default_values, to_dict
from glomo.training.loop import Task, set_up, train
from glomo.training.models import graph_meta
from glomo.training.run_folder import RunFolder
from glomo.training.staging import MakeStages
from glomo.training.targets.images import PixelRows, holds_images, images_of, pixels_for
from glomo.training.targets.words import glove
from glomo.training.texts import build_vocabulary, fingerprint, unlabelled
from glomo.training.train_config import TrainConfig, schedule_of
from glomo.transfer.groups import LayerGroup
from glomo.transfer.stages import Stage

STATISTICS_WINDOWS = 8  # zeros and dead rows are counted on so many held-out windows: their graphs are held in full


@dataclass(frozen=True)
class PretrainData:
    """The [data] section: which text, and how it becomes units."""

    text: tuple[str, ...] = ()
    """your own files (.txt .csv .tsv .jsonl), with commas between; when given, data.dataset is not read"""
    dataset: tuple[str, ...] = ()
    """names from the catalogue (`glomo data ls`), with commas between"""
    column: str = "text"
    """the text's column in .csv, .tsv and .jsonl files"""
    join: bool = True
    """the lines are one running text; false: every line (or field) is a text of its own"""
    vocabulary: Literal["words", "subwords"] = "words"
    """words or subwords"""
    vocab_size: int = 20_000
    """most units in the vocabulary"""
    min_count: int = 1
    """rarer words are unknown ones"""
    buckets: int = 0
    """so many ids more share the unknown words out, by a hash: a rare name can be found again in its text"""
    lowercase: bool = True
    """of words"""
    digits: bool = True
    """words with a digit in them all become N"""
    vectors: Literal["none", "glove-50d"] = "none"
    """word vectors from which the first columns of the embedding start, or none"""
    length: int = 128
    """most units in a training window"""
    levels: int = 16
    """of a data set of images: levels that a channel of a pixel is cut into; images are not cut into windows"""
    side: int = 0
    """of a data set of images: they are made so many pixels high and wide; 0: as they are"""
    valid: float = 0.05
    """share of the windows that is held out for validation"""
    valid_windows: int = 400
    """most windows held out"""

    def __post_init__(self) -> None:
        check_range("data.length", self.length, 1)
        check_range("data.valid_windows", self.valid_windows, 0)
        check_range("data.min_count", self.min_count, 1)
        check_range("data.buckets", self.buckets, 0)
        check_range("data.levels", self.levels, 1, 256)
        check_range("data.side", self.side, 0)
        if self.buckets and self.vocabulary == "subwords":
            raise UserError(f"data.buckets is {self.buckets}, but no piece of a word is unknown to subwords")
        if self.vectors != "none" and self.vocabulary == "subwords":
            raise UserError(f"data.vectors is {self.vectors}, which has vectors of words, and the units are subwords")


@dataclass(frozen=True)
class Pace:
    """The [pace] section: when and how fast the graph's own networks learn (queries, keys and biases)."""

    graph_rate: float = 1.0
    """factor of their learning rate"""
    graph_from: int = 0
    """steps in which they stay at their start values, while the rest learns to use the graphs that these give"""
    rescue_until: int = 0
    """the weight of the dead-row rescue falls in equal parts, to zero at this step; 0: it stays"""

    def __post_init__(self) -> None:
        check_range("pace.graph_rate", self.graph_rate, 0)
        check_range("pace.graph_from", self.graph_from, 0)
        check_range("pace.rescue_until", self.rescue_until, 0)

    def stages(self, train: TrainConfig) -> MakeStages | None:
        """The groups "graph" and "rest" -> stages of train.steps together; None where there is nothing to say."""
        if self.graph_rate == 1 and not self.graph_from:
            return None
        schedule, later = schedule_of(train), {"rest": train.lr, "graph": train.lr * self.graph_rate}
        first = min(self.graph_from, train.steps) if self.graph_rate else train.steps

        def stages(groups: Sequence[LayerGroup]) -> list[Stage]:
            parts = [
                Stage("start graph", first, {"rest": train.lr}, schedule, 0, train.steps),
                Stage("all", train.steps - first, later, schedule, first, train.steps),
            ]
            return [stage for stage in parts if stage.steps]

        return stages

    def before_step(self, model: GLoMo) -> Callable[[int], float] | None:
        """What is done before each step, counted from 1; it gives the factor of the step's rates."""
        if not self.rescue_until:
            return None

        def before(step: int) -> float:
            model.rescue_share = max(0.0, 1 - step / self.rescue_until)
            return 1.0

        return before


@dataclass(frozen=True)
class PretrainConfig:
    """A pre-training recipe."""

    DERIVED: ClassVar = {"model": ("vocab_size",)}

    data: PretrainData = field(default_factory=PretrainData)
    model: GLoMoConfig = field(default_factory=GLoMoConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pace: Pace = field(default_factory=Pace)


def pretrain(config: PretrainConfig, out: Path) -> dict[str, Any]:
    """Run a recipe: then ``out/final`` and ``out/best`` hold graphs for `load_graph`. Returns the last metrics row."""
    if not config.data.text and any(holds_images(name) for name in config.data.dataset):
        return _pretrain_on_images(config, out)
    texts = unlabelled(config.data.text, config.data.dataset, config.data.column)
    vocabulary = build_vocabulary(texts, config.data, config.data.buckets)
    # the shortest text to train on: one unit to read and D to predict
    windows = Windows(texts, vocabulary, config.data.length, config.model.horizon + 1, join=config.data.join)
    return pretrain_on(windows, vocabulary, config, out, {"text": fingerprint(texts)})


def _pretrain_on_images(config: PretrainConfig, out: Path) -> dict[str, Any]:
    if len(config.data.dataset) > 1 or config.data.vectors != "none":
        raise UserError("images are pre-trained on one data set at a time, and have no word vectors")
    if config.data.buckets or config.data.vocabulary != "words":
        raise UserError("data.buckets and data.vocabulary are of words; the units of images are pixels")
    images, _ = images_of(config.data.dataset[0], "train")
    pixels = pixels_for(config.data.dataset[0], images, config.data.levels, config.data.side)
    rows = PixelRows(pixels.sequences(images))
    return pretrain_on(rows, pixels, config, out, {"images": hashlib.sha256(rows.units.numpy().tobytes()).hexdigest()})


def pretrain_on(
    windows: Windows | PixelRows,
    vocabulary: AnyVocabulary,
    config: PretrainConfig,
    out: Path,
    identity: dict[str, str] | None = None,
) -> dict[str, Any]:
    """`pretrain` on windows that exist already; of ``windows`` only ``lengths`` and ``batch(indices)`` are used."""
    if config.pace.rescue_until and not config.model.rescue_weight:
        raise UserError("pace.rescue_until is of the dead-row rescue, and model.rescue_weight is 0: there is none")
    world = set_up(config.train)
    held_out = _held_out(len(windows.lengths), config.data)
    kept = sorted(set(range(len(windows.lengths))) - set(held_out))
    if not kept:
        raise UserError("no window is left to train on; a smaller data.valid or more text is needed")
    settings = dataclasses.replace(config.model, vocab_size=len(vocabulary))
    model = GLoMo(settings)
    if config.data.vectors != "none":
        found = start_from_vectors(model.graph_predictor.embedding.weight, vocabulary)
        if world.rank == 0:
            print(f"pretrain: {found:,} of {len(vocabulary):,} units start from a vector", file=sys.stderr)

    def loss(indices: list[int], generator: torch.Generator) -> tuple[Tensor, int, int]:
        tokens, lengths = windows.batch(kept[index] for index in indices)
        value = model(tokens.to(world.device), lengths.to(world.device), generator)
        return value, count_predictions(settings, lengths), int(lengths.sum())

    task = Task(
        model,
        BucketBatches(windows.lengths[kept], config.train.batch_size, config.train.seed),
        loss,
        (lambda: validate(model, windows, held_out, config.train.batch_size, world.device)) if held_out else None,
        graph_meta(settings, vocabulary, to_dict(config)),
        {"loss": "padding has no share", "vocabulary": vocabulary.fingerprint, **(identity or {})},
        "pretrain",
    )
    task.stages = config.pace.stages(config.train)
    task.before_step = config.pace.before_step(model)
    if task.stages:
        graph = r"graph_predictor\.directions"
        task.groups = {"rest": rf"(?!{graph}).+", "graph": graph}
    if world.rank:
        return train(task, config.train, None, world)
    with RunFolder(out, to_dict(config), defaults=default_values(config)) as folder:
        return train(task, config.train, folder, world)


@torch.no_grad()
def start_from_vectors(weight: Tensor, vocabulary: AnyVocabulary) -> int:
    """Put GloVe's 50 columns in the place of an embedding's first ones, scaled to the spread that it has; returns how
    many units have a vector. Rows of the others stay as they are.

    Raises UserError for an embedding of fewer columns.
    """
    known, table = glove()
    rows = [(unit, known[word.lower()]) for unit, word in enumerate(vocabulary.units()) if word.lower() in known]
    if weight.shape[1] < table.shape[1]:
        raise UserError(f"model.dim is {weight.shape[1]}; data.vectors has {table.shape[1]} columns, and needs as many")
    if rows:
        units, places = (list(column) for column in zip(*rows, strict=True))
        vectors = torch.tensor(table[places], device=weight.device)
        weight[units, : table.shape[1]] = (vectors - vectors.mean(0)) * (weight.std() / vectors.std())
    return len(rows)


@torch.no_grad()
def validate(
    model: GLoMo, windows: Windows | PixelRows, indices: list[int], batch_size: int, device: torch.device
) -> dict[str, float]:
    """Loss at all positions of the windows at ``indices`` (nats a unit), and zeros and dead rows of their graphs."""
    model.eval()
    order = sorted(indices, key=lambda index: int(windows.lengths[index]))
    total, count = 0.0, 0
    for start in range(0, len(order), batch_size):
        tokens, lengths = windows.batch(order[start : start + batch_size])
        terms = count_predictions(model.config, lengths)
        total += float(model(tokens.to(device), lengths.to(device))) * terms
        count += terms
    tokens, lengths = windows.batch(order[-STATISTICS_WINDOWS:])
    found = [graphs.statistics(lengths) for graphs in model.graph_predictor(tokens.to(device), lengths.to(device))]
    pairs, rows = sum(part.pairs for part in found), sum(part.rows for part in found)
    return {
        "valid_loss": total / max(count, 1),
        "share_zero": sum(part.zero_pairs for part in found) / max(pairs, 1),
        "share_dead": sum(part.dead_rows for part in found) / max(rows, 1),
    }


def count_predictions(config: GLoMoConfig, lengths: Tensor) -> int:
    """The number of predicted units in one direction's loss over sequences of these lengths, at all positions."""
    if config.objective == "sentence":
        return int((lengths - (lengths // 2).clamp(min=1)).clamp(min=0).sum())
    return int(sum((lengths - ahead).clamp(min=0).sum() for ahead in range(1, config.horizon + 1)))


def _held_out(count: int, data: PretrainData) -> list[int]:
    """Evenly spaced, so that they are like the rest; none when there is but one window."""
    if not 0 <= data.valid < 1:
        raise UserError(f"data.valid is {data.valid}; a share from 0 to below 1 is needed")
    size = min(data.valid_windows, max(1, round(data.valid * count)), count - 1) if data.valid else 0
    return [(2 * index + 1) * count // (2 * size) for index in range(size)]
