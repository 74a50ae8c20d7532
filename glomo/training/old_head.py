"""[close] lwf: the head of the classifier in tune.init learns along, and goes on saying what it said (Learning without
Forgetting)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from glomo.errors import UserError
from glomo.training.document_classifier import DocumentClassifier
from glomo.training.documents import EVALUATION_BATCH, Documents
from glomo.transfer.closeness import LwF

if TYPE_CHECKING:
    from glomo.training.trained_classifier import TrainedClassifier


class OldHead(nn.Module):
    """What the classifier of ``init`` says of the new task's documents, a buffer: it is asked once, by `fill`, when a
    run begins. Its head becomes a part of the model, so that it learns and is saved with it.

    Raises UserError where ``init`` is no classifier, or one whose head reads another kind of features.
    """

    def __init__(self, model: DocumentClassifier, documents: Documents, init: str, strength: float) -> None:
        super().__init__()
        old = _classifier(init)
        before = old.model
        if before.labels is not None:
            raise UserError(
                f"close.method is 'lwf', and the classifier in {init} has labels of [names]; one without is needed"
            )
        if (before.mix is None) != (model.mix is None):
            own, given = ("last" if one.mix is None else "mix" for one in (model, before))
            raise UserError(
                f"close.method is 'lwf', and the head in tune.init reads classifier.layers = {given!r}, this one "
                f"{own!r}; give --classifier.layers {given}"
            )
        if model.mix is not None and before.mix is not None:
            model.mix.load_state_dict(before.mix.state_dict())
        self.about = {old.task: {"part": "old_head", "classes": old.classes, "vocabulary": None, "head": old.head}}
        """{task: what `load_classifier` makes its classifier from}"""
        self.lwf = LwF(weight=strength)
        self._held, self._documents, self._init = (model,), documents, init  # in a tuple it is no child
        model.old_head = before.head

    def fill(self) -> None:
        """Ask the classifier as it was."""
        device = next(self._held[0].parameters()).device
        self.lwf.record(_classifier(self._init).model.to(device), self._batches(device))

    def loss(self, features: Tensor, indices: Sequence[int]) -> Tensor:
        """Of the old head on the documents of these numbers, whose features are (B, 3 dim)."""
        head = self._held[0].old_head
        assert head is not None
        value: Tensor = self.lwf(head(features), torch.tensor(indices))
        return value

    def _batches(self, device: torch.device) -> Iterator[tuple[tuple[Tensor, Tensor], None]]:
        for start in range(0, len(self._documents), EVALUATION_BATCH):
            indices = range(start, min(start + EVALUATION_BATCH, len(self._documents)))
            units, lengths, _ = self._documents.tensors(indices, device)
            yield (units, lengths), None


def _classifier(init: str) -> TrainedClassifier:
    """The one in a run folder, of the weights that `load_language_weights` takes. Raises UserError if there is none."""
    from glomo.training.trained_classifier import load_one  # which is made of what is trained here

    try:
        return load_one(init, ("best", "final"))
    except UserError as error:
        raise UserError(f"close.method is 'lwf', which needs a classifier in tune.init: {error}") from None
