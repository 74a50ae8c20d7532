"""Behaviour: does a language model give the right form of a word the higher probability?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glomo.nn.awd_lstm import LSTMLanguageModel
from glomo.nn.precision import at_least_fp32
from glomo.nn.transformer import LanguageModel
from glomo.transfer.probing.agreement import MinimalPair
from glomo.transfer.probing.evaluation import observing

NextUnit = Callable[[Sequence[int]], Tensor]
"""Units so far, none at the beginning -> log-probabilities (V,) of the next one."""


@dataclass(frozen=True)
class PairScore:
    """Pairs of a construction."""

    right: int
    """pairs whose right form has the higher probability; an equal one is wrong"""
    scored: int
    unknown: int
    """pairs with an unknown unit in one of their sentences: they do not count"""
    incomparable: int
    """pairs where one form is the beginning of the other, in units: it is always as probable; they do not count"""

    @property
    def accuracy(self) -> float | None:
        """Share of the scored pairs; None where there is none."""
        return self.right / self.scored if self.scored else None


def next_unit(model: LanguageModel | LSTMLanguageModel) -> NextUnit:
    """A causal language model as a function from units to log-probabilities, in evaluation mode, in fp32 at least.

    For a model that is none of glomo's, any function of the same kind does.
    """

    def log_probabilities(units: Sequence[int]) -> Tensor:
        device = next(model.parameters()).device
        read = torch.tensor([[model.end, *units]], device=device)
        with observing(model):
            hidden = model.encoder(read).raw if isinstance(model, LSTMLanguageModel) else model.hidden(read)
            logits = model.logits(hidden[0, -1])
            return logits.log_softmax(-1, dtype=at_least_fp32(logits.dtype))

    return log_probabilities


def log_probability(units: Sequence[int], log_probabilities: NextUnit, start: int = 0) -> float:
    """sum_{t >= start} log p(unit_t | units before it), in nats.

    Raises:
        ValueError: the function gives no vector of log-probabilities, or none for a unit.
    """
    total = 0.0
    for place in range(start, len(units)):
        found = log_probabilities(units[:place])
        if found.dim() != 1 or not 0 <= units[place] < len(found):
            raise ValueError(
                f"the log-probabilities are {tuple(found.shape)}; a vector that has unit {units[place]} is needed"
            )
        total += float(found[units[place]])
    return total


def minimal_pairs(
    pairs: Sequence[MinimalPair],
    encode: Callable[[str], Sequence[int]],
    log_probabilities: NextUnit,
    scoring: Literal["verb", "sentence"] = "verb",
    unknown: int | None = None,
    end: int | None = None,
) -> dict[str, PairScore]:
    """How often the right form wins, by construction:

    .. code-block:: text

        verb        log p(right form | before) > log p(wrong form | before)
        sentence    log p(before right after) > log p(before wrong after)

    The first looks no further than the form, the second also sees how the sentence goes on. A form of several units is
    the sum of theirs.

    Args:
        pairs: such as `agreement_pairs()`.
        encode: text to units, such as `vocabulary.encode`.
        log_probabilities: such as `next_unit(model)`.
        scoring: "verb" or "sentence".
        unknown: the unit of unknown words; pairs that have one are counted and not scored.
        end: the unit that ends texts, which then is part of a sentence.

    Raises:
        ValueError: the scoring is unknown; as `log_probability`.

    Source: Linzen, Dupoux & Goldberg, TACL 2016 (verb); Marvin & Linzen, EMNLP 2018 (sentence).
    """
    if scoring not in ("verb", "sentence"):
        raise ValueError(f"scoring is {scoring!r}; verb or sentence is needed")
    counts: dict[str, list[int]] = {}
    for pair in pairs:
        outcome = counts.setdefault(pair.construction, [0, 0, 0, 0])
        whole = [list(encode(sentence)) for sentence in pair.sentences]
        if unknown is not None and any(unknown in units for units in whole):
            outcome[2] += 1
            continue
        if scoring == "verb":
            right, wrong = ([*encode(f"{pair.before} {form}".strip())] for form in (pair.right, pair.wrong))
        else:
            right, wrong = (units if end is None else [*units, end] for units in whole)
        same = _shared(right, wrong)
        if same == min(len(right), len(wrong)):
            outcome[3] += 1
            continue
        # what both have before they differ is equally probable
        scores = [log_probability(units, log_probabilities, same) for units in (right, wrong)]
        outcome[0] += scores[0] > scores[1]
        outcome[1] += 1
    return {construction: PairScore(*outcome) for construction, outcome in counts.items()}


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many units they begin with alike."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
