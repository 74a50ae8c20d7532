"""A running text as rows that are read side by side, window by window, for a model that carries its state along."""

from __future__ import annotations

import numpy as np

from glomo.errors import UserError

SHORT_SHARE, DEVIATION, SHORTEST, LONGER = 0.05, 5.0, 5, 20


class StreamBatches:
    """A text cut into ``rows`` streams of equal length, and windows over all of them at once, a batch each: a pure
    function of ``(seed, step)``.

    Of ``count`` units to predict, row r has the n = count // rows from r n on. An epoch walks over the columns 0 .. n -
    1, each in one window. With jitter the windows end at other places every time:

    .. code-block:: text

        length' = length with probability 0.95, else length / 2
        window ~ Normal(length', 5), rounded down, from 5 to length + 20

    The lengths are drawn once and come in another order every epoch, the rest of the columns last: so all epochs have
    the same number of batches.

    Args:
        count: units to predict: a text of count + 1 units.
        rows: streams, over all processes together.
        length: columns in a window.
        seed: of the lengths and their order.
        jitter: false gives windows of exactly ``length``, but for the last.

    Raises:
        UserError: there is less than one unit for a row, or rows or length is below 1.

    Attributes:
        columns: n, the units in a row.
        left_out: units at the end of the text that are in no row.

    Source: Merity et al., ICLR 2018, section 5 (variable length backpropagation sequences).
    """

    def __init__(self, count: int, rows: int, length: int, seed: int, jitter: bool = True):
        if rows < 1 or length < 1:
            raise UserError(f"a batch of {rows} rows and {length} columns has nothing in it; at least 1 each is needed")
        if count < rows:
            raise UserError(f"the text has {count} units to predict, too few for {rows} rows; one a row is needed")
        self.rows, self.seed = rows, seed
        self.columns, self.left_out = divmod(count, rows)
        if jitter:
            shortest = min(SHORTEST, length)
            random, most = np.random.default_rng([seed, 0]), self.columns // shortest + 1
            means = np.where(random.random(most) < SHORT_SHARE, length / 2, length)
            sizes = random.normal(means, DEVIATION).astype(np.int64).clip(shortest, length + LONGER)
        else:
            sizes = np.full(self.columns // length + 1, length)
        ends = np.cumsum(sizes)
        self._sizes = sizes[: np.searchsorted(ends, self.columns)]  # whole windows before the one that is cut short
        self._planned = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._sizes) + 1

    def batch(self, step: int) -> list[int]:
        """The rows of the batch number ``step``, counted from 0 over all epochs: all of them, in order."""
        return list(range(self.rows))

    def window(self, step: int) -> tuple[int, int]:
        """(first column, columns) of that batch."""
        epoch, place = divmod(step, len(self))
        if self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        starts = self._planned[1]
        return int(starts[place]), int(starts[place + 1] - starts[place])

    def begins_epoch(self, step: int) -> bool:
        """Whether that batch is the first of an epoch, which states are zero at."""
        return step % len(self) == 0

    def _plan(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch begin, and the last one ends."""
        order = np.random.default_rng([self.seed, epoch + 1]).permutation(len(self._sizes))
        return np.concatenate([[0], np.cumsum(self._sizes[order]), [self.columns]])
