"""The [distil] section of a recipe: other classifiers as teachers of the one that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glomo.errors import UserError
from glomo.training.config import check_range
from glomo.transfer.signal import distillation_loss


@dataclass(frozen=True)
class Distil:
    """The [distil] section. Raises UserError for values out of range."""

    teachers: tuple[str, ...] = ()
    """run folders of `glomo finetune`, with commas between; of several the mean of their probabilities"""
    alpha: float = 0.5
    """the teachers' share of the loss; the labels have the rest"""
    temperature: float = 2.0
    """at which both are softened"""

    def __post_init__(self) -> None:
        check_range("distil.alpha", self.alpha, 0, 1)
        check_range("distil.temperature", self.temperature, 1e-3)


class Teachers(nn.Module):
    """What the teachers say of each example: log-probabilities (teachers, N, classes), a buffer. They are asked once,
    by `fill`, when a run begins."""

    said: Tensor

    def __init__(self, settings: Distil, texts: Sequence[str], classes: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.settings, self.texts, self.classes, self.device = settings, texts, list(classes), device
        self.register_buffer("said", torch.zeros(len(settings.teachers), len(texts), len(classes)))

    def fill(self) -> None:
        """Ask them. Raises UserError for teachers of other classes."""
        from glomo.training.trained_classifier import load_classifier  # which is made of what is trained here

        found = load_classifier(*self.settings.teachers)
        if found.classes != self.classes:
            known, needed = ", ".join(found.classes), ", ".join(self.classes)
            raise UserError(f"the task has the classes {needed}, but distil.teachers know {known}")
        said = torch.stack([one.probabilities(self.texts, self.device) for one in found.members])
        self.said.copy_(said.clamp(min=torch.finfo(said.dtype).tiny).log())

    def loss(self, logits: Tensor, labels: Tensor, indices: Sequence[int]) -> Tensor:
        """Distillation from them on the examples of these numbers."""
        of = self.said[:, torch.tensor(indices)].to(logits.device)
        return distillation_loss(logits, list(of), labels, self.settings.alpha, self.settings.temperature)
