"""Language modelling: running text in, a causal language model (settings, vocabulary, weights) out, in a run folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from glomo.data import AnyVocabulary, BucketBatches, pad, read_texts
from glomo.data.streams import StreamBatches
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel, State
from glomo.nn.embedded import PAD
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.training import checkpoint
from glomo.training.close import Close, check_learns, check_whole, make_penalty, with_penalty
from glomo.training.config import check_range, default_values, to_dict
from glomo.training.distributed import World, is_first
from glomo.training.loop import Task, set_up, train
from glomo.training.memory import PeakMemory
from glomo.training.models import END, LanguageWeights, load_language_weights, model_meta
from glomo.training.old_predictions import OldPredictions
from glomo.training.progress import track
from glomo.training.results import model_sizes, of_last, write_results
from glomo.training.run_folder import RunFolder
from glomo.training.staging import Staging
from glomo.training.texts import build_vocabulary, fingerprint, running_units, unlabelled
from glomo.training.train_config import TrainConfig
from glomo.training.tune import Tune, make_stages
from glomo.transfer.structure import copy_layers
from glomo.transfer.vocabulary import overlap

VALID_SHARE = 0.05  # of the text, from its end, where no other text is given for validation
VALID_ROWS = 8  # streams side by side while an lstm is validated
AnyLanguageModel = LanguageModel | LSTMLanguageModel


@dataclass(frozen=True)
class LanguageData:
    """The [data] section: which text, and how it becomes units."""

    text: tuple[str, ...] = ()
    """your own files (.txt .csv .tsv .jsonl), with commas between; when given, data.dataset is not read"""
    valid: str = ""
    """a file of validation text; without it the data set's own, or the last twentieth of the text"""
    dataset: str = ""
    """a name from the catalogue (`glomo data ls`)"""
    column: str = "text"
    """the text's column in .csv, .tsv and .jsonl files"""
    vocabulary: Literal["words", "subwords", "init"] = "subwords"
    """words or subwords of the text, or those of the model in tune.init; rows of a unit new to it are the mean row"""
    vocab_size: int = 8000
    """most units in the vocabulary"""
    min_count: int = 1
    """rarer words are unknown ones"""
    lowercase: bool = False
    """of words"""
    digits: bool = False
    """words with a digit in them all become N"""
    length: int = 128
    """units that are read at a time; of an lstm on the average"""
    valid_units: int = 50_000
    """most units to validate on while training"""

    def __post_init__(self) -> None:
        check_range("data.length", self.length, 1)
        check_range("data.min_count", self.min_count, 1)
        check_range("data.valid_units", self.valid_units, 0)


@dataclass(frozen=True)
class LanguageMethod:
    """The [method] section: what is trained."""

    model: Literal["transformer", "lstm"] = "transformer"
    """settings are in [model] for the first, in [lstm] for the second; with tune.init its sizes are taken from there"""
    backward: bool = False
    """the text is read from its end to its beginning"""
    drop_mult: float = 1.0
    """of lstm: all five dropouts times this"""
    jitter: bool = True
    """of lstm: windows of random length, as published, and rates in proportion"""

    def __post_init__(self) -> None:
        check_range("method.drop_mult", self.drop_mult, 0)


@dataclass(frozen=True)
class LanguageConfig:
    """A language model's recipe."""

    DERIVED: ClassVar = {"model": ("vocab_size", "encoder_attention", "smoothing"), "lstm": ("vocab_size",)}

    data: LanguageData = field(default_factory=LanguageData)
    method: LanguageMethod = field(default_factory=LanguageMethod)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    lstm: AWDLSTMConfig = field(default_factory=AWDLSTMConfig)
    tune: Tune = field(default_factory=Tune)
    train: TrainConfig = field(default_factory=TrainConfig)
    close: Close = field(default_factory=Close)


def train_language_model(config: LanguageConfig, out: Path) -> dict[str, Any]:
    """Run a recipe: then ``out/final`` and ``out/best`` hold models for `load_language_model`, and ``out/results.json``
    the validation loss, the size, seconds and memory. Returns the last metrics row."""
    texts, held_texts = load_texts(config.data)
    world = set_up(config.train)
    memory = PeakMemory(world.device)
    model, vocabulary = make_model(config, texts)
    config = resolved(config)
    units = running_units(texts, vocabulary, model.end)
    if held_texts:
        held = running_units(held_texts, vocabulary, model.end)
    else:
        kept = len(units) - int(VALID_SHARE * len(units))
        units, held = units[:kept], units[kept - 1 :]
    if len(units) < 3:
        raise UserError(f"the text has {len(units) - 1} units, its end included; at least 2 are needed")
    if config.method.backward:
        units, held = units.flip(0), held.flip(0)

    def validate() -> dict[str, float]:
        part, length = held[: config.data.valid_units + 1], config.data.length
        if isinstance(model, LSTMLanguageModel):
            total, count = stream_likelihood(model, part, VALID_ROWS, length, world.device)
        else:
            total, count = negative_log_likelihood(model, part, length, length, world.device)
        return {"valid_loss": total / max(count, 1)}

    model.to(world.device)
    of = (config.tune.init, config.train.seed, config.method.backward)
    penalty = make_penalty(config.close, model, model, vocabulary, *of)
    check_whole(config.close, config.tune)
    if config.close.method == "lwf":
        raise UserError("close.method is 'lwf', which is for heads of classifiers; a language model's is outputs")
    predictions = (
        OldPredictions(model, config.close.strength) if config.close and config.close.method == "outputs" else None
    )
    task = (
        _of_streams(model, units, config, world, predictions)
        if isinstance(model, LSTMLanguageModel)
        else _of_windows(model, units, config, world, predictions)
    )
    task.validate = validate if len(held) > 1 and config.data.valid_units else None
    task.meta = model_meta("language-model", model.config.to_dict(), vocabulary, to_dict(config))
    task.identity = {"vocabulary": vocabulary.fingerprint, "text": fingerprint(texts)}
    task.groups = layer_patterns(model)
    task.extras = predictions
    task.noted = predictions.noted if predictions else {}
    if penalty is not None:
        task.extras, task.fill = penalty.term, penalty.fill
        task.loss = with_penalty(task.loss, penalty.term, task.noted)
    if not config.tune.plain:
        task.stages = make_stages(config.tune, config.train, len(task.batches))
        if penalty is not None:
            pulled = list(penalty.term.pulled().values())
            check_learns(config.close, pulled, Staging(model, task.groups, task.stages, validates=True))
    if world.rank:
        return train(task, config.train, None, world)
    size = model_sizes(model, task.groups, task.stages)
    with RunFolder(out, to_dict(config), defaults=default_values(config)) as folder:
        finished = folder.final.exists()
        row = train(task, config.train, folder, world)
        results: dict[str, Any] = {**of_last(row), "examples": len(units) - 1, **size, "budget": config.train.steps}
        if task.validate and not config.train.shard:  # a stage may have gone back to weights before the last row's
            model.load_state_dict(checkpoint.load(folder.final).weights)
            results |= task.validate()
        write_results(folder.path, results, None if finished else memory)
        return row


def make_model(config: LanguageConfig, texts: list[str]) -> tuple[AnyLanguageModel, AnyVocabulary]:
    """(a model with start weights, or those of tune.init, its vocabulary).

    Raises UserError where tune.init is a model of another kind or direction.
    """
    lstm, init = config.method.model == "lstm", config.tune.init
    if config.data.vocabulary == "init" and not init:
        raise UserError("data.vocabulary is 'init', the one of the model in tune.init, but tune.init is empty")
    found = load_language_weights(init) if init else None
    vocabulary = (
        found.vocabulary if found and config.data.vocabulary == "init" else build_vocabulary(texts, config.data)
    )
    changes: dict[str, Any] = {"vocab_size": len(vocabulary)}
    if found:
        found.check(config.method.model, config.method.backward)
        changes |= found.sizes
    if lstm:
        settings = dataclasses.replace(config.lstm, **changes).scaled(config.method.drop_mult)
        model: AnyLanguageModel = LSTMLanguageModel(settings)
    else:
        transformer = dataclasses.replace(config.model, **changes, smoothing=0.0)
        if transformer.max_length < config.data.length:
            raise UserError(
                f"data.length is {config.data.length}; model.max_length, which is {transformer.max_length}, is less"
            )
        model = LanguageModel(transformer)
    if found:
        model.load_state_dict(found.for_vocabulary(vocabulary))
        forget_above(model, config.tune.layers)
        known = overlap([*found.vocabulary.units(), END], [*vocabulary.units(), END])
        if known.new and is_first():
            print(f"{known.new:,} of {len(vocabulary):,} units are new to {init} and start as its mean one", flush=True)
    return model, vocabulary


class _OnLanguageModel(Protocol):
    """A recipe that may start from a language model."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def tune(self) -> Tune: ...
    @property
    def model(self) -> TransformerConfig: ...
    @property
    def lstm(self) -> AWDLSTMConfig: ...


Recipe = TypeVar("Recipe", bound=_OnLanguageModel)


def resolved(config: Recipe) -> Recipe:
    """The recipe with the sizes of the language model in tune.init: what a run folder records."""
    if not config.tune.init:
        return config
    found = load_language_weights(config.tune.init)
    return dataclasses.replace(config, **with_sizes(config.model, config.lstm, found))


def with_sizes(transformer: TransformerConfig, lstm: AWDLSTMConfig, found: LanguageWeights) -> dict[str, Any]:
    """The sections [model] and [lstm] with the sizes of the language model in tune.init.

    Raises UserError for a size in the recipe that is neither this one nor the default.
    """
    section = {"lstm": "lstm", "transformer": "model"}[found.architecture]
    given: TransformerConfig | AWDLSTMConfig = lstm if section == "lstm" else transformer
    sizes = found.sizes
    for name, size in sizes.items():
        said = getattr(given, name)
        if said not in (size, getattr(type(given)(), name)):
            raise UserError(
                f"{section}.{name} is {said}, but {size} in the language model of {found.path}; leave it out, or "
                "choose another tune.init"
            )
    return {"model": transformer, "lstm": lstm, section: dataclasses.replace(given, **sizes)}


def layer_patterns(model: AnyLanguageModel) -> dict[str, str]:
    """The layer groups of a language model, from the bottom to the top."""
    if isinstance(model, LSTMLanguageModel):
        return {"embedding": r"encoder\.embedding", "layer": r"encoder\.layers\.(\d+)", "decoder": "decoder"}
    patterns = {"embedding": r"embedding|decoder\.(?:positions|relative)", "layer": r"decoder\.layers\.(\d+)"}
    return patterns | ({"norm": r"decoder\.norm"} if model.config.norm == "pre" else {})


def forget_above(model: AnyLanguageModel, layers: int) -> None:
    """Draw the weights anew but for the embeddings and the first so many layers (-1: all stay), as tune.layers says.

    Raises UserError where there are not so many.
    """
    if layers > model.config.layers:
        raise UserError(f"tune.layers is {layers}; the language model of tune.init has {model.config.layers} layers")
    if layers < 0:
        return
    patterns = layer_patterns(model)
    kept = re.compile(
        "|".join([patterns["embedding"], *(patterns["layer"].replace(r"(\d+)", rf"{n}\.") for n in range(layers))])
    )
    fresh = type(model)(model.config)  # type: ignore[arg-type]
    copy_layers(fresh, model, {name: name for name in fresh.state_dict() if not kept.match(name)})


def _of_windows(
    model: LanguageModel, units: Tensor, config: LanguageConfig, world: World, predictions: OldPredictions | None
) -> Task:
    """Windows in random order."""
    length = config.data.length
    starts = range(0, len(units) - 1, length)

    def loss(indices: list[int], generator: torch.Generator) -> tuple[Tensor, int, int]:
        inputs, outputs = windows(units, [starts[i] for i in indices], length)
        terms = int((outputs != 0).sum())
        inputs, outputs = inputs.to(world.device), outputs.to(world.device)
        hidden = model.hidden(inputs)
        value = model.loss(hidden, outputs)
        if predictions is not None:
            value = value + predictions.distance(model.logits(hidden), predictions.read(inputs)[0], outputs != 0)
        return value, terms, terms

    lengths = [min(length, len(units) - 1 - start) for start in starts]
    return Task(model, BucketBatches(lengths, config.train.batch_size, config.train.seed), loss, title="lm")


class Streams:
    """The states of this process's streams, carried from window to window: the model's, and behind them those of the
    old predictions where there are any."""

    def __init__(self) -> None:
        self.state: State | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """(rows, width) each."""
        return {
            f"{kind}{layer}": x[0]
            for layer, pair in enumerate(self.state or [])
            for kind, x in zip("hc", pair, strict=True)
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        layers = len(state) // 2
        self.state = [(state[f"h{n}"][None].contiguous(), state[f"c{n}"][None].contiguous()) for n in range(layers)]
        self.state = self.state or None


def _of_streams(
    model: LSTMLanguageModel, units: Tensor, config: LanguageConfig, world: World, predictions: OldPredictions | None
) -> Task:
    """The text as streams side by side, read on window by window."""
    train_config, length = config.train, config.data.length
    if train_config.batch_size < world.size:
        raise UserError(
            f"train.batch_size is {train_config.batch_size}; each of {world.size} processes needs a stream at least"
        )
    batches = StreamBatches(len(units) - 1, train_config.batch_size, length, train_config.seed, config.method.jitter)
    rows = units[: batches.rows * batches.columns].view(batches.rows, batches.columns)
    following = units[1 : batches.rows * batches.columns + 1].view(batches.rows, batches.columns)
    streams, window = Streams(), (0, 0)

    def before_step(step: int) -> float:
        nonlocal window
        window = batches.window(step - 1)
        if batches.begins_epoch(step - 1):
            streams.state = None
        return window[1] / length if config.method.jitter else 1.0

    def loss(indices: list[int], generator: torch.Generator) -> tuple[Tensor, int, int]:
        columns = slice(window[0], window[0] + window[1])
        inputs, outputs = (x[indices, columns].long().to(world.device) for x in (rows, following))
        state = streams.state and [(h.to(world.device), c.to(world.device)) for h, c in streams.state]
        depth = model.config.layers
        encoded = model.encoder(inputs, state and state[:depth])
        value, _ = model.loss(encoded, outputs)
        streams.state = encoded.state
        if predictions is not None:
            before, after = predictions.read(inputs, state and state[depth:])
            value = value + predictions.distance(model.logits(encoded.dropped), before, outputs != PAD)
            streams.state = [*encoded.state, *after]
        return value, outputs.numel(), outputs.numel()

    return Task(model, batches, loss, title="lm", before_step=before_step, carried=streams)


def load_texts(data: LanguageData) -> tuple[list[str], list[str]]:
    """(training texts, validation texts or none). Raises UserError when no text is named."""
    texts = unlabelled(data.text, (data.dataset,) if data.dataset else (), data.column)
    if data.valid:
        return texts, read_texts(data.valid, data.column)
    if data.dataset and not data.text:
        from glomo.data import catalogue

        if "valid" in catalogue.find(data.dataset).splits:
            return texts, catalogue.load_texts(data.dataset, "valid")
    return texts, []


def windows(units: Tensor, starts: Iterable[int], length: int) -> tuple[Tensor, Tensor]:
    """(what is read, what follows it), (B, length) each, padded with 0 at the end of the text."""
    parts = [units[start : start + length + 1].long() for start in starts]
    return pad([part[:-1] for part in parts])[0], pad([part[1:] for part in parts])[0]


@torch.no_grad()
def negative_log_likelihood(
    model: LanguageModel,
    units: Tensor,
    length: int,
    stride: int,
    device: torch.device | str = "cpu",
    batch: int = 16,
    progress: bool = False,
) -> tuple[float, int]:
    """(nats, units) of all units but the first. Windows of ``length`` begin every ``stride`` units, and count what no
    window before them has counted: but for the first window's, a unit is predicted from more than ``length - stride``.
    """
    model.eval()
    total, count = 0.0, 0
    starts = [0, *range(stride, max(len(units) - 1 - (length - stride), 0), stride)]
    parts = [starts[first : first + batch] for first in range(0, len(starts), batch)]
    for part in track(parts, "lm", "batch") if progress else parts:
        inputs, outputs = windows(units, part, length)
        for row, start in enumerate(part):
            if start:
                outputs[row, : length - stride] = 0
        terms = int((outputs != 0).sum())
        total += float(model(inputs.to(device), outputs.to(device))) * terms
        count += terms
    return total, count


@torch.no_grad()
def stream_likelihood(
    model: LSTMLanguageModel,
    units: Tensor,
    rows: int,
    length: int,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[float, int]:
    """(nats, units) of all units but the first, and but the few that are left over by rows of equal length; each row
    is read from its beginning with its state carried along, so that one row gives every unit all that is before it."""
    model.eval()
    batches = StreamBatches(len(units) - 1, max(1, min(rows, len(units) - 1)), length, 0, jitter=False)
    size = batches.rows * batches.columns
    inputs, outputs = (x[:size].long().view(batches.rows, -1).to(device) for x in (units[:-1], units[1:]))
    total, state = 0.0, None
    steps = range(len(batches))
    for step in track(steps, "lm", "window") if progress else steps:
        start, columns = batches.window(step)
        part = slice(start, start + columns)
        _, nats, state = model(inputs[:, part], outputs[:, part], state)
        total += float(nats) * batches.rows * columns
    return total, size
