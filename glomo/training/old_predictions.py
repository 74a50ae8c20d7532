"""[close] outputs: what the language model of tune.init says follows each unit, and how far the one that learns is from
it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glomo.nn.awd_lstm import LSTMLanguageModel, State
from glomo.nn.transformer import LanguageModel
from glomo.transfer.closeness import output_distance
from glomo.transfer.closeness.source_model import SourceModel


class OldPredictions(nn.Module):
    """A frozen copy of a language model, part of a run's checkpoints.

    .. code-block:: text

        strength KL(p0(unit | units before it) || p(unit | units before it))

    It reads the same units as the model, from a state of its own, without dropout. All logits are in memory.

    Source: Yu et al., ICASSP 2013 (KLD-regularised adaptation), of a language model.
    """

    def __init__(self, model: LSTMLanguageModel | LanguageModel, strength: float) -> None:
        super().__init__()
        self.source, self.strength = SourceModel(model), strength
        self.noted: dict[str, float] = {}  # for `Task.noted`: what has been added to the loss as "penalty"

    @torch.no_grad()
    def read(self, units: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(features (B, T, dim), state to go on from; a Transformer's is empty) of units (B, T)."""
        model = self.source.model
        if isinstance(model, LSTMLanguageModel):
            encoded = model.encoder(units, state)
            return encoded.raw, encoded.state
        assert isinstance(model, LanguageModel)
        return model.hidden(units), []

    def distances(self, logits: Tensor, features: Tensor, real: Tensor) -> Tensor:
        """(B,) the sum over the units that are `real` (B, T) of each row, from the model's logits (B, T, V) and the
        features of `read`."""
        model = self.source.model
        assert isinstance(model, LSTMLanguageModel | LanguageModel)
        with torch.no_grad():
            before = model.logits(features)
        rows = zip(logits.split(1), before.split(1), real.split(1), strict=True)
        return self.strength * torch.stack(
            [output_distance(now, old, "kl", here) * here.sum() for now, old, here in rows]
        )

    def distance(self, logits: Tensor, features: Tensor, real: Tensor) -> Tensor:
        """The mean over all of these units, which is noted."""
        return self.note(self.distances(logits, features, real).sum() / real.sum().clamp(min=1))

    def note(self, value: Tensor) -> Tensor:
        """The value, a part of what is added to the loss."""
        self.noted["penalty"] = self.noted.get("penalty", 0.0) + float(value.detach())
        return value
