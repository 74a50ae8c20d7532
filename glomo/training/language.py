"""Language modelling: running text in, a causal language model (settings, vocabulary, weights) out, in a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from glomo.data import AnyVocabulary, BucketBatches, pad, read_texts
from glomo.errors import UserError
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.training.config import check_range, to_dict
from glomo.training.loop import Task, set_up, train
from glomo.training.models import model_meta
from glomo.training.progress import track
from glomo.training.run_folder import RunFolder
from glomo.training.texts import build_vocabulary, fingerprint, unlabelled
from glomo.training.train_config import TrainConfig

VALID_SHARE = 0.05  # of the text, from its end, where no other text is given for validation


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
    vocabulary: Literal["words", "subwords"] = "subwords"
    """words or subwords"""
    vocab_size: int = 8000
    """most units in the vocabulary"""
    min_count: int = 1
    """rarer words are unknown ones"""
    lowercase: bool = False
    """of words"""
    digits: bool = False
    """words with a digit in them all become N"""
    length: int = 128
    """units that are read at a time"""
    valid_units: int = 50_000
    """most units to validate on while training"""

    def __post_init__(self) -> None:
        check_range("data.length", self.length, 1)
        check_range("data.min_count", self.min_count, 1)
        check_range("data.valid_units", self.valid_units, 0)


@dataclass(frozen=True)
class LanguageConfig:
    """A language model's recipe."""

    DERIVED: ClassVar = {"model": ("vocab_size", "encoder_attention", "smoothing")}

    data: LanguageData = field(default_factory=LanguageData)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def train_language_model(config: LanguageConfig, out: Path) -> dict[str, Any]:
    """Run a recipe: then ``out/final`` and ``out/best`` hold models for `load_language_model`. Returns the last metrics
    row."""
    length = config.data.length
    if config.model.max_length < length:
        raise UserError(f"data.length is {length}; model.max_length, which is {config.model.max_length}, is less")
    texts, held_texts = load_texts(config.data)
    vocabulary = build_vocabulary(texts, config.data)
    settings = dataclasses.replace(config.model, vocab_size=len(vocabulary), smoothing=0.0)
    world = set_up(config.train)
    model = LanguageModel(settings)
    units = running_units(texts, vocabulary, model.end)
    if held_texts:
        held = running_units(held_texts, vocabulary, model.end)
    else:
        kept = len(units) - int(VALID_SHARE * len(units))
        units, held = units[:kept], units[kept - 1 :]
    if len(units) < 3:
        raise UserError(f"the text has {len(units) - 1} units, its end included; at least 2 are needed")
    starts = range(0, len(units) - 1, length)

    def loss(indices: list[int], generator: torch.Generator) -> tuple[Tensor, int, int]:
        inputs, outputs = windows(units, [starts[i] for i in indices], length)
        terms = int((outputs != 0).sum())
        return model(inputs.to(world.device), outputs.to(world.device)), terms, terms

    def validate() -> dict[str, float]:
        total, count = negative_log_likelihood(model, held[: config.data.valid_units + 1], length, length, world.device)
        return {"valid_loss": total / max(count, 1)}

    task = Task(
        model,
        BucketBatches([min(length, len(units) - 1 - s) for s in starts], config.train.batch_size, config.train.seed),
        loss,
        validate if len(held) > 1 and config.data.valid_units else None,
        model_meta("language-model", settings.to_dict(), vocabulary, to_dict(config)),
        {"vocabulary": vocabulary.fingerprint, "text": fingerprint(texts)},
        "lm",
    )
    if world.rank:
        return train(task, config.train, None, world)
    with RunFolder(out, to_dict(config)) as folder:
        return train(task, config.train, folder, world)


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


def running_units(texts: Iterable[str], vocabulary: AnyVocabulary, end: int) -> Tensor:
    """All texts in one row of units, with ``end`` before the first and behind each."""
    units = [end]
    for text in texts:
        units += [*vocabulary.encode(text), end]
    return torch.tensor(units, dtype=torch.int32)


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
