"""Sequences out of a model that predicts unit by unit: greedy and beam search, and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from glomo.errors import UserError


class Stepwise(Protocol):
    """A batch being decoded."""

    def step(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (B, V) of what follows, once tokens (B,) have been read."""

    def select(self, rows: Tensor) -> None:
        """Rows of the batch, in a new order."""


@torch.no_grad()
def greedy(
    state: Stepwise, batch: int, end: int, max_length: int, device: torch.device | str = "cpu"
) -> list[list[int]]:
    """The most probable unit at every step, until `end` or `max_length` units; `end` also starts the sequences."""
    tokens = torch.full((batch,), end, dtype=torch.int64, device=device)
    done, steps = torch.zeros(batch, dtype=torch.bool, device=device), []
    for _ in range(max_length):
        tokens = state.step(tokens).argmax(-1).masked_fill(done, end)
        done |= tokens == end
        steps.append(tokens)
        if bool(done.all()):
            break
    rows = torch.stack(steps, 1).tolist() if steps else [[] for _ in range(batch)]
    return [row[: row.index(end)] if end in row else row for row in rows]


@torch.no_grad()
def beam_search(
    state: Stepwise,
    batch: int,
    end: int,
    max_length: int,
    beam: int = 4,
    length_penalty: float = 0.6,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """The sequence of the highest score among those that `beam` unfinished ones at a time lead to.

    .. code-block:: text

        score(y) = log P(y) / ((5 + |y|) / 6)^length_penalty,    |y| with its end

    A sentence is done when `beam` sequences of it have ended and none that goes on has a better chance, or after
    `max_length` units.

    Raises:
        UserError: beam is below 1.

    Source: Wu et al., arXiv 1609.08144, section 7, with its length penalty.
    """
    if beam < 1:
        raise UserError(f"a beam of {beam} keeps no sequence; at least 1 is needed")
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch)]
    tokens = torch.full((batch,), end, dtype=torch.int64, device=device)
    log_probabilities = state.step(tokens).repeat_interleave(beam, 0)
    size = log_probabilities.size(-1)
    first_row = torch.arange(batch, device=device)[:, None] * beam
    state.select(torch.arange(batch, device=device).repeat_interleave(beam))
    scores = torch.full((batch, beam), float("-inf"), device=device)
    scores[:, 0] = 0.0  # all sequences of a sentence begin equal: one of them stands for the others
    history = torch.empty(batch, beam, 0, dtype=torch.int64, device=device)
    for length in range(1, max_length + 1):
        candidates = (scores[:, :, None] + log_probabilities.view(batch, beam, size)).flatten(1)
        best, index = candidates.topk(min(2 * beam, candidates.size(1)), dim=1)
        parents, units = index // size, index % size
        ended = units == end
        for row, place in (ended[:, :beam] & best[:, :beam].isfinite()).nonzero().tolist():
            sequence = history[row, parents[row, place]].tolist()
            finished[row].append((float(best[row, place]) / _penalty(length, length_penalty), sequence))
        scores, order = best.masked_fill(ended, float("-inf")).topk(beam, dim=1)
        parents, units = parents.gather(1, order), units.gather(1, order)
        history = torch.cat([history.gather(1, parents[..., None].expand(-1, -1, length - 1)), units[..., None]], -1)
        most = _penalty(max_length, length_penalty)  # log-probabilities only fall: no score can rise above this
        chances = [score / most for score in scores[:, 0].tolist()]
        if length == max_length or all(
            len(found) >= beam and chance <= max(found)[0] for found, chance in zip(finished, chances, strict=True)
        ):
            break
        state.select((first_row + parents).flatten())
        log_probabilities = state.step(units.flatten())
    unfinished = _penalty(max_length + 1, length_penalty)
    for row, found in enumerate(finished):
        if not found or history.size(-1) == max_length:
            found += [
                (score / unfinished, sequence)
                for score, sequence in zip(scores[row].tolist(), history[row].tolist(), strict=True)
                if score > float("-inf")
            ]
    return [max(found)[1] if found else [] for found in finished]


@torch.no_grad()
def sample(
    state: Stepwise,
    prompt: Sequence[int],
    end: int,
    max_length: int,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> list[int]:
    """Units drawn one by one behind a prompt, until `end` or `max_length` of them, each with the probability

    .. code-block:: text

        p(unit)^(1 / temperature) / sum of the same over the top_k most probable units (0: over all)

    Raises:
        UserError: there is no prompt, temperature is not above 0 and finite, or top_k is negative.
    """
    if not prompt:
        raise UserError("a prompt of no units: the first is what starts sequences")
    if not 0 < temperature < float("inf") or top_k < 0:
        raise UserError(
            f"the temperature is {temperature} and top_k {top_k}; a finite one above 0, and at least 0, are needed"
        )
    found: list[int] = []
    for unit in prompt:
        log_probabilities = state.step(torch.tensor([unit], device=device))[0]
    while len(found) < max_length:
        scores, units = log_probabilities.topk(min(top_k or len(log_probabilities), len(log_probabilities)))
        p = ((scores - scores[0]).double() / temperature).softmax(-1)  # the first is the largest
        drawn = torch.multinomial(p.cpu(), 1, generator=generator)
        unit = int(units[drawn])
        if unit == end:
            break
        found.append(unit)
        if len(found) < max_length:
            log_probabilities = state.step(torch.tensor([unit], device=device))[0]
    return found


def _penalty(length: int, length_penalty: float) -> float:
    return ((5 + length) / 6) ** length_penalty
