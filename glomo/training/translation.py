"""Translation: sentence pairs in, a trained translator (settings, vocabulary, weights) in the run folder out."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from glomo.data import BucketBatches, Subwords, TokenBatches, pad, read_pairs
from glomo.errors import UserError
from glomo.nn.rnn import RNNConfig, RNNTranslator
from glomo.nn.transformer import LanguageModel, Transformer
from glomo.nn.transformer_config import TransformerConfig
from glomo.training import checkpoint
from glomo.training.config import check_range, default_values, to_dict
from glomo.training.language import AnyLanguageModel
from glomo.training.language_model import language_model
from glomo.training.loop import Task, set_up, train
from glomo.training.memory import PeakMemory
from glomo.training.models import load_language_weights, model_meta
from glomo.training.results import model_sizes, of_last, write_results
from glomo.training.run_folder import RunFolder
from glomo.training.texts import fingerprint
from glomo.training.train_config import TrainConfig
from glomo.transfer.structure import initialise_from_language_model

Pairs = list[tuple[str, str]]
Ids = tuple[list[int], list[int]]


@dataclass(frozen=True)
class PairsData:
    """The [data] section: which pairs, and how they become units."""

    pairs: tuple[str, ...] = ()
    """your own files (.tsv .csv .jsonl) of training pairs, with commas between; when given, data.dataset is not read"""
    valid: str = ""
    """a file of validation pairs; without it one pair of 64 of data.pairs is held out, by a hash of its source"""
    source: str = "source"
    """the source's column"""
    target: str = "target"
    """the target's column"""
    dataset: str = ""
    """a data set of pairs from the catalogue (`glomo data ls`)"""
    swap: bool = False
    """translate the other way round"""
    vocab_size: int = 8000
    """most units in the vocabulary that both languages share"""
    max_length: int = 100
    """longest source and target in units; longer pairs are left out of training"""
    valid_pairs: int = 1000
    """most validation pairs"""

    def __post_init__(self) -> None:
        check_range("data.max_length", self.max_length, 1)
        check_range("data.valid_pairs", self.valid_pairs, 0)


@dataclass(frozen=True)
class Method:
    """The [method] section: what is trained, and how sentences are searched for afterwards."""

    model: Literal["transformer", "rnn", "rnn-attention"] = "transformer"
    """settings are in [model] for the first, in [rnn] for the others"""
    average: int = 1
    """the result is the mean of so many of the newest checkpoints' weights"""
    beam: int = 4
    """sequences kept at a time; 1 is greedy"""
    length_penalty: float = 0.6
    """0 prefers short sentences, 1 is about the mean log-probability of a unit"""

    def __post_init__(self) -> None:
        check_range("method.average", self.average, 1)
        check_range("method.beam", self.beam, 1)
        check_range("method.length_penalty", self.length_penalty, 0)


@dataclass(frozen=True)
class Init:
    """The [init] section: what a Transformer starts from."""

    model: str = ""
    """run or checkpoint folder of a Transformer language model (`glomo lm`) of text in both languages, in place of
    random weights: its vocabulary is taken, and its layers start encoder and decoder. model.dim, heads, ff, norm,
    positions and kinds of attention must be as there; layers above its last start from random weights"""
    weights: bool = True
    """false: its vocabulary alone is taken, to see what the weights are worth"""

    def __post_init__(self) -> None:
        if not (self.weights or self.model):
            raise UserError("init.weights is false, which takes the vocabulary of init.model alone; that is empty")


@dataclass(frozen=True)
class TranslationConfig:
    """A translation recipe."""

    DERIVED: ClassVar = {"model": ("vocab_size",), "rnn": ("vocab_size", "attention")}

    data: PairsData = field(default_factory=PairsData)
    method: Method = field(default_factory=Method)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    rnn: RNNConfig = field(default_factory=RNNConfig)
    init: Init = field(default_factory=Init)
    train: TrainConfig = field(default_factory=TrainConfig)


def load_pairs(data: PairsData) -> tuple[Pairs, Pairs]:
    """(training pairs, validation pairs). Raises UserError when none are named."""
    if data.pairs:
        found = [pair for path in data.pairs for pair in read_pairs(path, data.source, data.target)]
        if data.valid:
            kept, held = found, read_pairs(data.valid, data.source, data.target)
        else:
            kept = [pair for pair in found if not _held_out(pair[0])]
            held = [pair for pair in found if _held_out(pair[0])]
    elif data.dataset:
        from glomo.data import catalogue

        kept, held = (catalogue.load_pairs(data.dataset, split) for split in ("train", "valid"))
    else:
        raise UserError(
            "the recipe names no pairs: give --data.pairs FILE or --data.dataset NAME (see `glomo data ls`)"
        )
    held = _spread(held, data.valid_pairs)
    return (_swapped(kept), _swapped(held)) if data.swap else (kept, held)


def train_translation(config: TranslationConfig, out: Path) -> dict[str, Any]:
    """Run a recipe: then ``out/final`` holds a translator for `load_translator`, and ``out/results.json`` the
    validation loss, the size, seconds and memory. Returns the last metrics row."""
    if config.method.average > config.train.keep:
        raise UserError(f"method.average is {config.method.average}, but train.keep keeps only {config.train.keep}")
    if config.method.average > 1 and config.train.average != "none":
        raise UserError(
            f"method.average is {config.method.average} and train.average {config.train.average!r}; give one of them"
        )
    training, validation = load_pairs(config.data)
    found, vocabulary = _language_model(config) if config.init.model else (None, None)
    vocabulary = vocabulary or Subwords.train((side for pair in training for side in pair), config.data.vocab_size)
    fitting, held = (_encoded(pairs, vocabulary, config.data.max_length) for pairs in (training, validation))
    if not fitting:
        raise UserError(f"no training pair has at most data.max_length = {config.data.max_length} units a side")

    world = set_up(config.train)
    memory = PeakMemory(world.device)
    model, settings = make_model(config, len(vocabulary))
    if config.init.weights and isinstance(found, LanguageModel) and isinstance(model, Transformer):
        try:
            initialise_from_language_model(model, found)
        except ValueError as error:
            raise UserError(f"init.model is {config.init.model!r}, which does not fit [model]: {error}") from None
    lengths = [max(map(len, pair)) + 1 for pair in fitting]
    batches: BucketBatches | TokenBatches = BucketBatches(lengths, config.train.batch_size, config.train.seed)
    if config.train.batch_tokens:
        batches = TokenBatches(lengths, config.train.batch_tokens, config.train.seed)

    def loss(indices: list[int], generator: torch.Generator) -> tuple[Tensor, int, int]:
        return mean_loss(model, [fitting[i] for i in indices], world.device)

    def validate() -> dict[str, float]:
        return {"valid_loss": validation_loss(model, held, world.device)}

    meta = model_meta("translation", settings, vocabulary, to_dict(config))
    meta["method"] = dataclasses.asdict(config.method)
    identity = {"vocabulary": vocabulary.fingerprint, "pairs": fingerprint("\t".join(pair) for pair in training)}
    task = Task(model, batches, loss, validate if held else None, meta, identity, "translate")
    if world.rank:
        return train(task, config.train, None, world)
    size = model_sizes(model, task.groups, task.stages)
    with RunFolder(out, to_dict(config), defaults=default_values(config)) as folder:
        if len(fitting) < len(training):
            left = f"{len(training) - len(fitting):,} of {len(training):,} pairs"
            print(f"{left} are left out: longer than data.max_length, or without a unit", flush=True)
        finished = folder.final.exists()
        row = train(task, config.train, folder, world)
        newest = checkpoint.step_folders(folder.checkpoints)[-config.method.average :]
        if config.method.average > 1:
            checkpoint.save(folder.final, checkpoint.average(newest), None, {"step": row["step"], **meta})
        results: dict[str, Any] = {**of_last(row), "examples": len(fitting), **size, "budget": config.train.steps}
        if held and config.method.average > 1 and not config.train.shard:
            model.load_state_dict(checkpoint.load(folder.final).weights)
            results |= validate()
        write_results(folder.path, results, None if finished else memory)
        return row


def make_model(config: TranslationConfig, vocab_size: int) -> tuple[Transformer | RNNTranslator, dict[str, Any]]:
    """(a model with start weights, its settings as plain values)."""
    if config.method.model == "transformer":
        if "graph" in config.model.encoder_attention:
            raise UserError("`glomo translate` has no graph for model.encoder_attention; use softmax or relu2")
        settings = dataclasses.replace(config.model, vocab_size=vocab_size)
        if settings.max_length <= config.data.max_length:
            raise UserError(
                f"model.max_length is {settings.max_length}; it must be above data.max_length, which is "
                f"{config.data.max_length}, for the end of a sequence"
            )
        return Transformer(settings), settings.to_dict()
    rnn = dataclasses.replace(config.rnn, vocab_size=vocab_size, attention=config.method.model == "rnn-attention")
    return RNNTranslator(rnn), rnn.to_dict()


def _language_model(config: TranslationConfig) -> tuple[AnyLanguageModel, Subwords]:
    """(the language model that init.model says, its vocabulary). Raises UserError where it can start no translator."""
    found, said = load_language_weights(config.init.model), f"init.model is {config.init.model!r}"
    if found.architecture != "transformer" or config.method.model != "transformer":
        raise UserError(
            f"{said}, a language model of the kind {found.architecture}, and method.model {config.method.model!r}; a "
            "Transformer starts a Transformer"
        )
    if found.backward:
        raise UserError(f"{said}, which reads backward; a translator writes forward")
    if not isinstance(found.vocabulary, Subwords):
        raise UserError(f"{said}, whose vocabulary is of words; one of subwords is needed (data.vocabulary)")
    return language_model(found), found.vocabulary


def mean_loss(model: Transformer | RNNTranslator, pairs: list[Ids], device: torch.device) -> tuple[Tensor, int, int]:
    """(mean loss in nats, units predicted, units read)."""
    sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    (source, source_lengths), (target, lengths) = pad(sources), pad(targets)
    value = model(source.to(device), source_lengths.to(device), target.to(device), lengths.to(device))
    terms = int((lengths + 1).sum())
    return value, terms, terms + int(source_lengths.sum())


@torch.no_grad()
def validation_loss(model: Transformer | RNNTranslator, pairs: list[Ids], device: torch.device) -> float:
    """Nats a target unit, without smoothing."""
    model.eval()
    total, count = 0.0, 0
    order = sorted(pairs, key=lambda pair: max(map(len, pair)))
    for start in range(0, len(order), 64):
        value, terms, _ = mean_loss(model, order[start : start + 64], device)
        total, count = total + float(value) * terms, count + terms
    return total / max(count, 1)


def _held_out(source: str) -> bool:
    return hashlib.sha256(source.lower().encode("utf-8", "surrogatepass")).digest()[0] % 64 == 1


def _encoded(pairs: Pairs, vocabulary: Subwords, max_length: int) -> list[Ids]:
    """Both sides as units, without pairs that are too long or empty."""
    ids = ((vocabulary.encode(source), vocabulary.encode(target)) for source, target in pairs)
    return [pair for pair in ids if min(map(len, pair)) > 0 and max(map(len, pair)) <= max_length]


def _swapped(pairs: Pairs) -> Pairs:
    return [(b, a) for a, b in pairs]


def _spread(pairs: Pairs, most: int) -> Pairs:
    """At most so many of the pairs, evenly from all of them."""
    return pairs if len(pairs) <= most else [pairs[i * len(pairs) // most] for i in range(most)]
