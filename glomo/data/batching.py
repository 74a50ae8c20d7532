"""Ids into batches: padding, windows over long texts, and length-bucketed batches in a reproducible order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from glomo.data.vocabulary import AnyVocabulary
from glomo.errors import UserError

PAD_ID = 0
# Batches are cut from pools of this many batches, sorted by length: enough for little padding, few enough to
# stay shuffled.
POOL = 50


def pad(sequences: Sequence[Sequence[int] | Tensor]) -> tuple[Tensor, Tensor]:
    """Put id sequences of different lengths into one tensor, padded at the end.

    Returns:
        ``tokens (B, T)`` int64 with T the longest length, and ``lengths (B,)`` int64.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    longest = int(lengths.max()) if len(sequences) else 0
    tokens = torch.full((len(sequences), longest), PAD_ID, dtype=torch.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
    return tokens, lengths


class Windows:
    """Texts cut into windows of at most ``length`` units, for pre-training; every unit is in exactly one window.

    A text of n units is cut into the fewest windows, ``ceil(n / length)``, whose sizes differ by at most one: no
    short rest is left over that would have to be dropped or counted twice. Only whole texts of fewer than ``minimum``
    units are left out (``left_out`` says how many).

    Args:
        texts: the texts, or the lines of one running text.
        vocabulary: turns text into ids.
        length: the most units in a window, at least ``2 * minimum - 1``.
        minimum: the fewest units worth training on: a decoder of D units needs D + 1.
        join: the texts are the lines of one running text, and windows may cross their ends.

    Raises:
        UserError: no text has ``minimum`` units, or ``length`` is too small.

    Attributes:
        lengths: units per window, ``(N,)`` int64.
        left_out: number of texts that were too short.
    """

    def __init__(
        self, texts: Iterable[str], vocabulary: AnyVocabulary, length: int, minimum: int = 2, join: bool = False
    ):
        if length < max(1, 2 * minimum - 1):
            raise UserError(
                f"windows of {length} units are too short: at least {max(1, 2 * minimum - 1)} are needed, twice the "
                f"minimum of {minimum} less one"
            )
        encoded = (np.asarray(vocabulary.encode(text), dtype=np.int32) for text in texts)
        documents = [np.concatenate([np.empty(0, np.int32), *encoded])] if join else list(encoded)
        kept = [document for document in documents if len(document) >= max(1, minimum)]
        if not kept:
            longest = max((len(document) for document in documents), default=0)
            raise UserError(
                f"the text has {longest} unit{'s' * (longest != 1)}, but at least {minimum} are needed: one to read "
                f"and {minimum - 1} to predict"
            )
        self.left_out = len(documents) - len(kept)
        sizes = [size for document in kept for size in _even_sizes(len(document), length)]
        self._units = torch.from_numpy(np.concatenate(kept))
        self._ends = np.cumsum(sizes)
        self.lengths = torch.tensor(sizes, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Tensor:
        """The ids of one window, ``(length of it,)`` int64."""
        end = int(self._ends[index])
        return self._units[end - int(self.lengths[index]) : end].long()

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """The windows at ``indices`` as padded ``(tokens, lengths)``."""
        return pad([self[index] for index in indices])


def _even_sizes(units: int, length: int) -> list[int]:
    parts = -(-units // length)
    small, larger = divmod(units, parts)
    return [small + 1] * larger + [small] * (parts - larger)


class BucketBatches:
    """Batches of examples of similar length, shuffled anew every epoch: a pure function of ``(seed, step)``.

    Nothing has to be saved to resume: ``batch(step)`` is the same in every process that is given the same arguments.
    Every epoch holds every example once; its one smaller batch, if any, comes at a random place.

    Args:
        lengths: the length of every example.
        batch_size: examples in a batch, over all ranks together.
        seed: of the shuffling.
        rank, world_size: give each of several processes an equal share of every batch, disjoint from the others'.
            For shares to be equal, the smaller batch loses up to ``world_size - 1`` examples, others every epoch.

    Raises:
        UserError: there is no example, or ``batch_size`` is not a positive multiple of ``world_size``.
    """

    def __init__(self, lengths: Sequence[int] | Tensor, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if not len(self._lengths):
            raise UserError("there is no example to make batches of; at least one is needed")
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"a batch size of {batch_size} cannot be shared by {world_size} process(es); a positive multiple of "
                f"{world_size} is needed"
            )
        if world_size > len(self._lengths):
            raise UserError(
                f"{len(self._lengths)} examples cannot be shared by {world_size} processes; at least one each is needed"
            )
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        full, rest = divmod(len(self._lengths), batch_size)
        self._batches = full + (rest >= world_size)
        self._planned: tuple[int, list[list[int]]] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._batches

    def batch(self, step: int) -> list[int]:
        """This rank's examples of the batch number ``step``, counted from 0 over all epochs."""
        epoch, place = divmod(step, self._batches)
        return self.epoch(epoch)[place]

    def epoch(self, number: int) -> list[list[int]]:
        """All of this rank's batches of one epoch, in order."""
        if self._planned is None or self._planned[0] != number:
            self._planned = (number, self._plan(number))
        return self._planned[1]

    def _plan(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self._lengths))
        batches: list[list[int]] = []
        for start in range(0, len(order), POOL * self.batch_size):
            pool = order[start : start + POOL * self.batch_size]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            batches += [pool[i : i + self.batch_size].tolist() for i in range(0, len(pool), self.batch_size)]
        shares = []
        for place in random.permutation(len(batches)):
            batch = batches[place]
            share = len(batch) // self.world_size
            if share:
                # Strided, so that every rank's share has the same mixture of lengths.
                shares.append(batch[self.rank :: self.world_size][:share])
        return shares


class TokenBatches:
    """Batches of examples of similar length with at most so many units, padding included, shuffled anew every epoch: a
    pure function of ``(seed, step)``, as `BucketBatches`.

    Args:
        lengths: the length of every example; of pairs the longer side's, which both are padded to at most.
        tokens: the most units in a batch over all processes, longest length times examples.
        seed: of the shuffling.

    Raises:
        UserError: there is no example, or one that is longer than ``tokens``.
    """

    def __init__(self, lengths: Sequence[int] | Tensor, tokens: int, seed: int):
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if not len(self._lengths):
            raise UserError("there is no example to make batches of; at least one is needed")
        if self._lengths.max() > tokens:
            raise UserError(
                f"an example has {self._lengths.max()} units, and a batch takes {tokens}; a larger train.batch_tokens "
                "or a smaller data.max_length is needed"
            )
        self.seed, self._planned = seed, (-1, list[list[int]]())
        # sorted by length, the batches of every epoch are cut at the same places
        self._cuts, start = [0], 0
        for end, length in enumerate(np.sort(self._lengths).tolist()):
            if (end + 1 - start) * length > tokens:
                self._cuts.append(start := end)
        self._cuts.append(len(self._lengths))

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._cuts) - 1

    def batch(self, step: int) -> list[int]:
        """The examples of the batch number ``step``, counted from 0 over all epochs."""
        epoch, place = divmod(step, len(self))
        if self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        return self._planned[1][place]

    def _plan(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self._lengths))
        order = order[np.argsort(self._lengths[order], kind="stable")]  # equal lengths stay in random order
        return [order[self._cuts[place] : self._cuts[place + 1]].tolist() for place in random.permutation(len(self))]
