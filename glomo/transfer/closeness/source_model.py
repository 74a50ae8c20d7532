"""A source model that is asked and never trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from glomo.transfer.examples import check_tensor


class SourceModel(nn.Module):
    """A frozen copy of a model, always in evaluation mode, without gradients. The model itself may be trained on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> SourceModel:
        """Evaluation mode, whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The model's outputs.

        Raises:
            TypeError: they are no tensor.
        """
        return check_tensor(self.model(*inputs, **named))
