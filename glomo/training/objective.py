"""What a step of `glomo finetune` minimises: the loss of the labels, and what the sections of a recipe add to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.data import AnyVocabulary
from glomo.nn.awd_lstm import LSTMLanguageModel
from glomo.training.close import make_penalty
from glomo.training.distil import Teachers
from glomo.training.distributed import World
from glomo.training.document_classifier import DocumentClassifier
from glomo.training.documents import Documents
from glomo.training.finetune_config import FinetuneConfig
from glomo.training.loop import Batches
from glomo.training.names import AnyLabels
from glomo.training.old_head import OldHead
from glomo.training.old_predictions import OldPredictions
from glomo.training.slices import SlicedExamples
from glomo.training.tasks import OtherTasks
from glomo.training.unlabelled import UnlabelledTexts
from glomo.transfer import auxiliary_weight


class Objective(nn.Module):
    """The loss of a recipe's step:

    .. code-block:: text

        the labels' loss  (cross-entropy; or that of [distil], [slices], [names], or annealed by [unlabelled] tsa)
        + the language model's loss and penalties, weighted
        + [unlabelled]  + [close] lwf, outputs          ([close]'s penalty on weights comes on top, see `with_penalty`)

    A step on another task ([tasks]) has the loss of that alone. The parts that remember something are children: they
    are saved with a run, and `fill` asks the old data when it begins.

    Args:
        documents, texts: what is trained on, as units and as written.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: DocumentClassifier,
        vocabulary: AnyVocabulary,
        backward: bool,
        documents: Documents,
        texts: Sequence[str],
        classes: Sequence[str],
        slices: SlicedExamples | None,
        tasks: OtherTasks | None,
        batches: Batches,
        world: World,
    ) -> None:
        super().__init__()
        self._held = (model,)  # in a tuple it is no child
        self.config, self.documents, self.slices, self.tasks, self.world = config, documents, slices, tasks, world
        self.weight, self.epoch = config.classifier.auxiliary, config.tune.stage_steps or len(batches)
        close, seed = config.close, config.train.seed
        self.teachers = Teachers(config.distil, texts, classes, world.device) if config.distil.teachers else None
        model.to(world.device)
        penalty = make_penalty(close, model, model.language_model, vocabulary, config.tune.init, seed, backward)
        self.penalty = penalty.term if penalty else None
        self._ask_old_texts = penalty.fill if penalty else None
        outputs, lwf = (bool(close) and close.method == method for method in ("outputs", "lwf"))
        self.predictions = OldPredictions(model.language_model, close.strength) if outputs else None
        self.old_head = OldHead(model, documents, config.tune.init, close.strength) if lwf else None
        model.to(world.device)
        self.stream = None
        if config.unlabelled.method != "none":
            options = (vocabulary, config.data.length, backward, config.train.batch_size, config.train.steps)
            self.stream = UnlabelledTexts(config.unlabelled, model, *options, seed, world)
        self.noted = self.stream.noted if self.stream else {}
        if self.predictions is not None:
            self.predictions.noted = self.noted

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of the data that it reads besides the labelled ones."""
        found = {"unlabelled": self.stream, "tasks": self.tasks}
        return {name: part.fingerprint for name, part in found.items() if part is not None}

    @property
    def held(self) -> list[nn.Parameter]:
        """Parameters that [close] keeps near tune.init, or what follows from them."""
        if self.penalty is not None:
            return list(self.penalty.pulled().values())
        if self.predictions is None and self.old_head is None:
            return []
        encoder = self._held[0].language_model
        of_decoder = {id(p) for p in encoder.decoder.parameters()} if isinstance(encoder, LSTMLanguageModel) else set()
        return [p for p in encoder.parameters() if id(p) not in of_decoder]

    @property
    def unread(self) -> list[nn.Parameter]:
        """Parameters of the language model that nothing here depends on."""
        encoder = self._held[0].language_model
        if self.weight or self.config.tune.method == "sequential" or not isinstance(encoder, LSTMLanguageModel):
            return []
        return list(encoder.decoder.parameters())

    def fill(self) -> None:
        """Ask the old texts, the teachers and the old classifier, when a run begins."""
        if self._ask_old_texts is not None:
            self._ask_old_texts()
        for part in (self.teachers, self.old_head):
            if part is not None:
                part.fill()

    def before_step(self, step: int) -> float:
        """Take note of the step, counted from 1; for `Task.before_step`."""
        if self.stream is not None:
            self.stream.before_step(step)
        if self.config.tune.method == "sequential":
            self.weight = auxiliary_weight((step - 1) // self.epoch)
        return 1.0

    def loss(self, indices: list[int], generator: torch.Generator) -> tuple[Tensor, int, int]:
        """(loss, documents, units) of the documents of these numbers; for `Task.loss`."""
        if self.tasks is not None and indices[0] >= len(self.documents):
            return self.tasks.loss(indices, self.weight, self.predictions, self.world.device)
        units, lengths, labels = self.documents.tensors(indices, self.world.device)
        features, extra = self._held[0].pooled(units, lengths, self.weight, self.predictions)
        value = extra + self._of_labels(features, labels, indices)
        if self.old_head is not None:
            old = self.old_head.loss(features, indices)
            self.noted["penalty"] = float(old.detach())
            value = value + old
        if self.stream is not None:
            value = value + self.stream.loss(features, generator)
        return value, len(indices), int(lengths.sum())

    def _of_labels(self, features: Tensor, labels: Tensor, indices: list[int]) -> Tensor:
        model = self._held[0]
        if self.slices is not None:
            return self.slices.loss(model, features, labels, indices)
        logits = model.head(features)
        if isinstance(model.labels, AnyLabels):
            return model.labels.loss(logits, labels)
        if self.teachers is not None:
            return self.teachers.loss(logits, labels, indices)
        if self.stream is not None:
            return self.stream.labelled(logits, labels)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.classifier.smoothing)
