"""Labelled documents as units and numbers: encoded, drawn, and judged by a classifier."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.data import AnyVocabulary, encode_labels, pad
from glomo.errors import UserError
from glomo.training.config import check_range
from glomo.training.texts import LabelledData, sample

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class FinetuneData(LabelledData):
    """The [data] section: the labelled task."""

    valid: float = 0.1
    """share of these that is held out for validation; 0: none"""
    length: int = 0
    """units after which a document is cut; 0: it is read to its end, however long"""
    vocab_size: int = 20_000
    """most words in the vocabulary without tune.init, most units in those of tasks.vocabulary"""
    min_count: int = 1
    """rarer words are unknown ones, in these vocabularies of words; with 1 training has no unknown word, and the test's
    mean nothing to the classifier"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("data.valid", self.valid, 0, 0.9)
        check_range("data.length", self.length, 0)
        check_range("data.min_count", self.min_count, 1)


@dataclass(frozen=True)
class Documents:
    """Documents as units, with their labels as numbers."""

    ids: list[list[int]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, indices: Sequence[int]) -> Documents:
        return Documents([self.ids[i] for i in indices], [self.labels[i] for i in indices])

    def tensors(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(units, lengths, labels) of some."""
        units, lengths = pad([self.ids[i] for i in indices])
        labels = torch.tensor([self.labels[i] for i in indices])
        return units.to(device), lengths.to(device), labels.to(device)


def encode(
    examples: Sequence[tuple[str, str]], vocabulary: AnyVocabulary, classes: Sequence[str], length: int, backward: bool
) -> Documents:
    """Texts to units, labels to numbers (UserError: unknown)."""
    labels = encode_labels([label for _, label in examples], classes)
    return Documents([units_of(text, vocabulary, length, backward) for text, _ in examples], labels)


def units_of(text: str, vocabulary: AnyVocabulary, length: int, backward: bool) -> list[int]:
    """At most `length` units (0: all), in the order in which they are read; at least one."""
    units = vocabulary.encode(text)[: length or None] or [vocabulary.unk_id]
    return units[::-1] if backward else units


def draw(documents: Documents, classes: Sequence[str], data: FinetuneData, seed: int) -> tuple[list[int], list[int]]:
    """(documents to train on, documents held out for validation).

    Raises UserError where a class has no document to train on.
    """
    everything = sample(len(documents), data.labels, seed)
    shuffled = random.Random(f"valid {seed}").sample(everything, len(everything))
    count = int(data.valid * len(everything))
    held, kept = sorted(shuffled[:count]), sorted(shuffled[count:])
    counts = Counter(documents.labels[i] for i in kept)
    empty = [name for number, name in enumerate(classes) if not counts[number]]
    if empty:
        raise UserError(
            f"the class {empty[0]!r} has no example among the {len(kept)} to train on; with data.labels = "
            f"{data.labels} and data.valid = {data.valid} another train.seed, or more labels, are needed"
        )
    return kept, held


def probabilities(model: nn.Module, ids: Sequence[list[int]], device: torch.device) -> Tensor:
    """(documents, classes), in fp32 on the CPU, of a model from (units, lengths) to logits."""
    return logits(model, ids, device).softmax(-1)


@torch.no_grad()
def logits(model: nn.Module, ids: Sequence[list[int]], device: torch.device) -> Tensor:
    """(documents, classes), in fp32 on the CPU, of a model from (units, lengths) to logits."""
    model.eval()
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = torch.empty(0)
    for start in range(0, len(order), EVALUATION_BATCH):
        part = order[start : start + EVALUATION_BATCH]
        units, lengths = pad([ids[i] for i in part])
        values = model(units.to(device), lengths.to(device)).float().cpu()
        found = found if len(found) else torch.empty(len(ids), values.size(1))
        found[part] = values
    return found


def evaluate(model: nn.Module, documents: Documents, device: torch.device) -> dict[str, float]:
    """{accuracy, loss}: share of right answers, mean nats."""
    return figures_of(probabilities(model, documents.ids, device), documents.labels)


def figures_of(found: Tensor, labels: Sequence[int]) -> dict[str, float]:
    target = torch.tensor(labels)
    right = int((found.argmax(-1) == target).sum())
    return {"accuracy": right / len(labels), "loss": float(F.nll_loss(found.clamp(min=1e-30).log(), target))}
