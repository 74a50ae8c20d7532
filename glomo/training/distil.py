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
    """What the teachers say of each example, asked once: log-probabilities (teachers, N, classes), a buffer.

    Raises UserError for teachers of other classes.
    """

    said: Tensor

    def __init__(self, settings: Distil, texts: Sequence[str], classes: Sequence[str], device: torch.device) -> None:
        from glomo.training.trained_classifier import load_classifier  # which is made of what is trained here

        super().__init__()
        self.settings = settings
        found = load_classifier(*settings.teachers)
        if found.classes != list(classes):
            raise UserError(
                f"the task has the classes {', '.join(classes)}, but distil.teachers know {', '.join(found.classes)}"
            )
        said = torch.stack([one.probabilities(texts, device) for one in found.members])
        self.register_buffer("said", said.clamp(min=torch.finfo(said.dtype).tiny).log())

    def loss(self, logits: Tensor, labels: Tensor, indices: Sequence[int]) -> Tensor:
        """Distillation from them on the examples of these numbers."""
        of = self.said[:, torch.tensor(indices)].to(logits.device)
        return distillation_loss(logits, list(of), labels, self.settings.alpha, self.settings.temperature)
