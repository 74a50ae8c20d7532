"""Documents of any length as one vector each, in bounded memory, and the classifier on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn.embedded import PAD
from glomo.nn.precision import at_least_fp32

States = Sequence[tuple[Tensor, ...]] | None
"""What an encoder carries from chunk to chunk: tensors (., B, ...) by layer, or nothing."""


class ConcatPooling(NamedTuple):
    """What a document's units have come to so far:

    .. code-block:: text

        [last ; max_t ; mean_t] of its features, padding left out

    Source: Howard and Ruder, ACL 2018, section 3.3 (concat pooling).
    """

    last: Tensor
    """(B, dim)"""
    greatest: Tensor
    """(B, dim)"""
    total: Tensor
    """(B, dim)"""
    size: Tensor
    """(B, 1), how many units"""

    @classmethod
    def of(cls, features: Tensor, real: Tensor) -> ConcatPooling:
        """Of features (B, T, dim) where `real` (B, T); every row begins with a real unit, and padding is behind."""
        dtype = at_least_fp32(features.dtype)  # thousands of units are more than bf16 can add
        size = real.sum(1, keepdim=True)
        last = features.gather(1, (size - 1)[..., None].expand(-1, -1, features.size(2)))[:, 0].to(dtype)
        greatest = features.masked_fill(~real[..., None], float("-inf")).amax(1).to(dtype)
        return cls(last, greatest, features.masked_fill(~real[..., None], 0).sum(1, dtype=dtype), size)

    def before(self, later: ConcatPooling) -> ConcatPooling:
        """The two together: `later` goes on with these documents, and may begin more, which stand behind them."""
        more = len(later.size) - len(self.size)
        greatest = torch.maximum(F.pad(self.greatest, (0, 0, 0, more), value=float("-inf")), later.greatest)
        total = F.pad(self.total, (0, 0, 0, more)) + later.total
        return ConcatPooling(later.last, greatest, total, F.pad(self.size, (0, 0, 0, more)) + later.size)

    def result(self) -> Tensor:
        """(B, 3 dim)"""
        return torch.cat([self.last, self.greatest, self.total / self.size], -1)


class Chunk(NamedTuple):
    """A step of `pooled_documents`: what `b` of the documents read at it."""

    rows: Tensor
    """(b,), which documents"""
    starts: Tensor
    """(b,), where in them the chunk begins"""
    units: Tensor
    """(b, t)"""
    real: Tensor
    """(b, t), false where units are padding"""
    features: Tensor
    """(b, t, dim)"""


def pooled_documents(
    encode: Callable[[Tensor, States], tuple[Tensor, States]],
    units: Tensor,
    lengths: Tensor,
    chunk: int,
    window: int,
    observe: Callable[[Chunk], None] | None = None,
) -> Tensor:
    """`ConcatPooling` (B, 3 dim) of documents that are read in chunks, of which the last few have gradients.

    A document of n units is ceil(n / chunk) chunks, each read on from the state that the one before has left. All
    documents end at the same step, and begin when their turn comes; only the last `window` steps keep what a gradient
    needs. So memory is that of window x chunk units a document, whatever the length, and which of a document's chunks
    have a gradient does not depend on the others in the batch. Older chunks count in the pools as constants.

    Args:
        encode: ``(units (b, t <= chunk), state) -> (features (b, t, dim), state)``. The state is None at first; then
            what it has returned, with zeros for documents that begin, or None if it returns None.
        units: (B, T) ids, padded behind the lengths.
        lengths: (B,), from 1 to T.
        chunk: units read at a time.
        window: how many chunks of a document have gradients.
        observe: is shown each of the last `window` steps, for what else is to be made of the features.

    Raises:
        ValueError: a length is not from 1 to T, there is no document, or chunk or window is below 1.

    Source: Howard and Ruder, ACL 2018, section 3.3 (BPT3C).
    """
    sizes = lengths.tolist()
    if not sizes or min(sizes) < 1 or max(sizes) > units.size(1):
        given = f"from {min(sizes)} to {max(sizes)}" if sizes else "of no document"
        raise ValueError(f"the lengths are {given}; from 1 to {units.size(1)}, the width of the units, are needed")
    if chunk < 1 or window < 1:
        raise ValueError(f"chunk is {chunk} and window {window}; at least 1 is needed of each")
    device = units.device
    order = sorted(range(len(sizes)), key=lambda row: -sizes[row])  # the longest begin first
    sizes, rows = [sizes[row] for row in order], torch.tensor(order, device=device)
    lengths = torch.tensor(sizes, device=device)
    parts = [-(-n // chunk) for n in sizes]
    state: States = None
    pool: ConcatPooling | None = None
    for left in range(parts[0], 0, -1):  # steps to go, this one included
        reading = sum(n >= left for n in parts)
        starts = torch.tensor([(n - left) * chunk for n in parts[:reading]], device=device)
        width = chunk if left > 1 else max(n - (k - 1) * chunk for n, k in zip(sizes, parts, strict=True))
        places = starts[:, None] + torch.arange(width, device=device)
        real = places < lengths[:reading, None]
        read = units[rows[:reading, None], places.clamp(max=units.size(1) - 1)].masked_fill(~real, PAD)
        with torch.set_grad_enabled(torch.is_grad_enabled() and left <= window):
            features, state = encode(read, _with_room(state, reading))
            new = ConcatPooling.of(features, real)
            pool = new if pool is None else pool.before(new)
        if observe is not None and left <= window:
            observe(Chunk(rows[:reading], starts, read, real, features))
    assert pool is not None
    return pool.result()[rows.argsort()]


def _with_room(state: States, rows: int) -> States:
    """The state of `rows` documents: zeros behind those that it has."""
    if state is None:
        return None
    return [
        tuple(torch.cat([x, x.new_zeros(x.size(0), rows - x.size(1), *x.shape[2:])], 1) for x in layer)
        if layer[0].size(1) < rows
        else layer
        for layer in state
    ]


class Norm(nn.BatchNorm1d):
    """Batch normalisation that takes a batch of one in training: by the running statistics, which it does not move."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class PoolingHead(nn.Sequential):
    """(B, width) -> logits (B, classes): two blocks of batch normalisation, dropout and a linear layer, with ReLU
    between.

    Source: Howard and Ruder, ACL 2018, section 3.3.
    """

    def __init__(self, width: int, classes: int, hidden: int = 50, dropouts: tuple[float, float] = (0.4, 0.1)) -> None:
        first = [Norm(width), nn.Dropout(dropouts[0]), nn.Linear(width, hidden), nn.ReLU()]
        super().__init__(*first, Norm(hidden), nn.Dropout(dropouts[1]), nn.Linear(hidden, classes))
