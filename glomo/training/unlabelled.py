"""The [unlabelled] section of a recipe: texts without labels, of the task or of another domain, that learn along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.data import AnyVocabulary, BucketBatches
from glomo.errors import UserError
from glomo.training.config import check_range
from glomo.training.distributed import World
from glomo.training.document_classifier import DocumentClassifier
from glomo.training.documents import Documents, units_of
from glomo.training.texts import fingerprint, unlabelled
from glomo.transfer.domains import DomainAdversary
from glomo.transfer.signal import (
    ExponentialAverage,
    consistency_loss,
    consistency_ramp,
    mask_units,
    tsa_loss,
    tsa_threshold,
)


@dataclass(frozen=True)
class Unlabelled:
    """The [unlabelled] section. Raises UserError for values out of range."""

    method: Literal["none", "consistency", "mean-teacher", "domain"] = "none"
    """none; consistency: what is said of a text with masked units is to be what is said of the whole; mean-teacher: the
    same with the mean of the weights so far as the one who says it (the model itself is validated and kept); domain:
    features that do not tell these texts from the labelled ones (DANN); metrics.jsonl has domain_loss, which is ln 2 =
    0.693 where they cannot be told apart"""
    text: tuple[str, ...] = ()
    """your own files (.txt .csv .tsv .jsonl), with commas between; when given, unlabelled.dataset is not read"""
    dataset: str = ""
    """a name from the catalogue (`glomo data ls`); its labels are not looked at"""
    column: str = "text"
    """the text's column"""
    weight: float = 1.0
    """of their loss"""
    batch_size: int = 0
    """texts in a step, over all processes; 0: as many as labelled ones"""
    mask: float = 0.15
    """of consistency and mean-teacher: share of the units that are masked as unknown ones"""
    temperature: float = 1.0
    """of consistency and mean-teacher: below 1 the target is sharpened"""
    confidence: float = 0.0
    """of consistency and mean-teacher: texts whose most probable class is less so do not count"""
    ramp: int = 0
    """of consistency and mean-teacher: steps over which the weight rises from nearly nothing"""
    decay: float = 0.99
    """of mean-teacher: share of the old mean in the new one, at each step"""
    tsa: Literal["none", "linear", "exp", "log"] = "none"
    """training signal annealing: labelled examples that the model is too sure of are let go, by this schedule"""
    hidden: int = 100
    """of domain: width of the classifier of domains"""

    def __post_init__(self) -> None:
        if self.tsa != "none" and self.method == "none":
            raise UserError(f"unlabelled.tsa is {self.tsa!r}, and unlabelled.method is 'none'; it goes with a method")
        for name in ("weight", "batch_size", "ramp"):
            check_range(f"unlabelled.{name}", getattr(self, name), 0)
        for name in ("mask", "confidence", "decay"):
            check_range(f"unlabelled.{name}", getattr(self, name), 0, 1)
        check_range("unlabelled.temperature", self.temperature, 1e-3)
        check_range("unlabelled.hidden", self.hidden, 1)

    def texts(self) -> list[str]:
        """Raises UserError when none is named."""
        if not (self.text or self.dataset):
            raise UserError(
                f"unlabelled.method is {self.method!r}, which needs texts: unlabelled.text or unlabelled.dataset"
            )
        return unlabelled(self.text, (self.dataset,) if self.dataset else (), self.column)


class UnlabelledTexts(nn.Module):
    """The unlabelled texts beside a run's labelled ones: which of them a step reads is a function of (seed, step), as
    with those. Its buffers (the mean teacher's weights) are saved with the rest."""

    def __init__(
        self,
        settings: Unlabelled,
        model: DocumentClassifier,
        vocabulary: AnyVocabulary,
        length: int,
        backward: bool,
        batch_size: int,
        steps: int,
        seed: int,
        world: World,
    ) -> None:
        super().__init__()
        self.settings, self.world, self.steps = settings, world, steps
        texts = settings.texts()
        ids = [units_of(text, vocabulary, length, backward) for text in texts]
        self.fingerprint = fingerprint(texts)
        self.documents, self.unknown = Documents(ids, [0] * len(ids)), vocabulary.unk_id
        self.batches = BucketBatches([len(one) for one in ids], settings.batch_size or batch_size, seed)
        self.step = 0
        self.noted: dict[str, float] = {}  # for `Task.noted`
        self._models = (model,)  # in a tuple it is no child
        if settings.method == "domain":
            # a part of the model, so that it learns and is saved with it
            model.adversary = DomainAdversary(3 * model.language_model.config.dim, (settings.hidden,), 2, steps)
        self.teacher = ExponentialAverage(model, settings.decay, warmup=True) if self.taught else None

    @property
    def taught(self) -> bool:
        return self.settings.method == "mean-teacher"

    def before_step(self, step: int) -> None:
        """Take note of the step, counted from 1; the teacher follows the weights of the one before."""
        self.step = step
        if self.teacher is not None and step > 1:
            self.teacher.update_parameters(self._models[0])

    def labelled(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of labelled examples."""
        if self.settings.tsa == "none":
            return F.cross_entropy(logits.float(), labels)
        return tsa_loss(logits, labels, tsa_threshold(self.step - 1, self.steps, logits.size(-1), self.settings.tsa))

    def loss(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of this process's share of the step's texts, beside labelled ones of these features."""
        chosen = self.batches.batch(self.step - 1)
        share = chosen[self.world.rank :: self.world.size] or chosen[:1]
        units, lengths, _ = self.documents.tensors(share, self.world.device)
        model, settings = self._models[0], self.settings
        if settings.method == "domain":
            assert isinstance(model.adversary, DomainAdversary)
            model.adversary.reversal.step.fill_(self.step - 1)
            other, _ = model.pooled(units, lengths)
            found = model.adversary(features, other)
            self.noted |= {"domain_loss": float(found.loss.detach()), "domain_accuracy": float(found.accuracy)}
            return settings.weight * found.loss
        masked = mask_units(units, settings.mask, self.unknown, generator)
        with still_statistics(model):
            with torch.no_grad():
                clean = (self.teacher or model)(units, lengths)
            said = model(masked, lengths)
        weight = settings.weight * consistency_ramp(self.step - 1, settings.ramp)
        confidence = settings.confidence or None
        value = consistency_loss(clean, said, temperature=settings.temperature, confidence=confidence)
        self.noted["consistency_loss"] = float(value.detach())
        return weight * value


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Within it BatchNorm normalises by the batch, as in training, and remembers nothing of it."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
