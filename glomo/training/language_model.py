"""A trained language model: out of its checkpoint, texts in, their perplexity out, and new text."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glomo.data import AnyVocabulary, Subwords
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.nn.decoding import sample
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.training.language import AnyLanguageModel, negative_log_likelihood, running_units, stream_likelihood
from glomo.training.models import LanguageWeights, load_language_weights


@dataclass
class TrainedLanguageModel:
    """A model with its vocabulary."""

    model: AnyLanguageModel
    vocabulary: AnyVocabulary
    max_length: int
    """units that it can read at a time"""
    length: int
    """units that it was trained to read at a time: learned positions mean something up to there"""
    backward: bool = False
    """it reads and writes from the end to the beginning"""

    def perplexity(
        self,
        texts: Sequence[str],
        stride: int | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> dict[str, Any]:
        """Figures of the texts, one after the other:

        .. code-block:: text

            perplexity         exp(N / units),  N = -sum log p(unit | units before it), ends of texts included
            perplexity_word    exp(N / words),  words: what white space parts, and the ends
            bits_per_byte      N / log 2 / bytes of UTF-8 (only where no unit is unknown)

        The latter two do not depend on the vocabulary's size; unknown words count as one unit, so that a vocabulary of
        words has it easier. (Published figures of WikiText-2 are a token of its own tokenisation, ends of lines
        included: there are more of those.) Windows of the length that was trained on move by ``stride`` units (half the
        length); the loss while training takes one behind the other, which is a little higher. An LSTM has no windows:
        it reads all of the text in one go.

        Raises UserError for a stride that is not from 1 to the length, and for texts without a unit.
        """
        if stride is not None and isinstance(self.model, LSTMLanguageModel):
            raise UserError("an LSTM reads all of the text in one go; a stride is for a Transformer's windows")
        stride = max(1, self.length // 2) if stride is None else stride
        if not 1 <= stride <= self.length:
            raise UserError(f"the stride is {stride}; it must be from 1 to {self.length}, the length of the windows")
        units = running_units(texts, self.vocabulary, self.model.end)
        if len(units) <= len(texts) + 1:
            raise UserError("there is no text to judge the model by")
        units = units.flip(0) if self.backward else units
        model = self.model.to(device)
        if isinstance(model, LSTMLanguageModel):
            nats, count = stream_likelihood(model, units, 1, 4 * self.length, device, progress=progress)
        else:
            nats, count = negative_log_likelihood(model, units, self.length, stride, device, progress=progress)
        words = sum(len(text.split()) + 1 for text in texts)
        figures: dict[str, Any] = {
            "perplexity": _exp(nats / count),
            "perplexity_word": _exp(nats / words),
        }
        if isinstance(self.vocabulary, Subwords):
            figures["bits_per_byte"] = round(nats / math.log(2) / sum(len(text.encode()) + 1 for text in texts), 4)
        parameters = sum(p.numel() for p in self.model.parameters())
        return {**figures, "units": count, "words": words, "parameters": parameters}

    def generate(
        self, prompt: str = "", units: int | None = None, temperature: float = 1.0, top_k: int = 0, seed: int = 0
    ) -> str:
        """The prompt and what the model would write behind it (a backward model: before it), until it ends or for so
        many units (None: 100, or as many as it takes).

        Raises UserError where the prompt and the units together are longer than the model takes, for a negative number
        of units and for a seed that is none.
        """
        before = self.vocabulary.encode(prompt)
        most = self.max_length - len(before)
        units = max(1, min(100, most)) if units is None else units
        if units > most:
            raise UserError(
                f"{len(before)} units of prompt and {units} more are too many; the model takes {self.max_length}"
            )
        if units < 0 or not -(2**63) <= seed < 2**63:
            raise UserError(f"units is {units} and the seed {seed}; at least 0, and a number of 64 bits, are needed")
        generator = torch.Generator().manual_seed(seed)
        state, end = self.model.eval().start(), self.model.end
        device = next(self.model.parameters()).device
        before = before[::-1] if self.backward else before
        text = [*before, *sample(state, [end, *before], end, units, temperature, top_k, generator, device)]
        return self.vocabulary.decode(text[::-1] if self.backward else text)


def load_language_model(path: str | Path) -> TrainedLanguageModel:
    """The language model in a checkpoint folder, or in a run folder (its ``best/`` if there is one, else ``final/``).

    Raises UserError when the folder is missing, damaged, or holds no language model, and when its vocabulary is not the
    one that the model was trained with.
    """
    found = load_language_weights(path)
    length, model = int(found.data["length"]), language_model(found)
    if isinstance(model, LSTMLanguageModel):
        longest = sys.maxsize
    else:
        longest = length if model.config.positions == "learned" else model.config.max_length
    return TrainedLanguageModel(model, found.vocabulary, longest, length, found.backward)


def language_model(found: LanguageWeights) -> AnyLanguageModel:
    """The model of the settings and weights. Raises UserError where they do not fit."""
    try:
        model: AnyLanguageModel
        if found.architecture == "lstm":
            model = LSTMLanguageModel(AWDLSTMConfig.from_dict(found.model))
        else:
            model = LanguageModel(TransformerConfig.from_dict(found.model))
        model.load_state_dict(found.weights)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{found.path}: its settings and weights do not fit ({str(error)[:200]})") from None
    return model


def _exp(nats: float) -> float:
    return round(math.exp(nats), 3) if nats < 700 else math.inf
