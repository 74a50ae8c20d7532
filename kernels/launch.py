"""The host's side of the Triton kernels: tensors as operands with three leading dimensions, and one launch as data.

Nothing here imports Triton, so that `import glomo` stays light and works where Triton is missing. A `Launch` holds all
that a kernel gets: it is run on a GPU (or by Triton's interpreter), and compiled offline by `bench.codegen`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .configurations import Configuration

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads this variable when a kernel is defined; then kernels run on the CPU, on CPU tensors."""

Strides = tuple[int, ...]


class Operand(NamedTuple):
    """A tensor (d0, d1, d2, rows, columns) as kernels see it; a stride of 0 broadcasts. Statistics of rows have no
    columns."""

    pointer: Any  # a tensor, or None in what is remembered
    d0: int
    d1: int
    d2: int
    row: int
    column: int = 0


class Launch(NamedTuple):
    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    configuration: Configuration

    def run(self) -> None:
        """Every kernel's first argument is an operand. Triton launches on the current GPU, which need not be its."""
        if not self.programs:
            return
        with torch.cuda.device_of(next(iter(self.arguments.values())).pointer):
            try:
                self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)
            except Exception as error:
                if type(error).__name__ != "OutOfResources":  # Triton's, which is not imported here
                    raise
                c = self.configuration
                raise RuntimeError(
                    f"This GPU is too small for the tiles ({c.M} x {c.N}) of glomo's {self.kernel.__name__}: {error} "
                    'Run the call inside glomo.kernels.use_backend("blocked").'
                ) from error

    @property
    def options(self) -> dict[str, int]:
        """Left to itself, NVIDIA's assembler sometimes spills a few registers to make room for a second block."""
        options = dict(num_warps=self.configuration.warps, num_stages=self.configuration.stages)
        return options if torch.version.hip else options | dict(maxnreg=min(255, 2048 // self.configuration.warps))


def lead_strides(t: Tensor, lead: torch.Size, tail: int) -> Strides:
    """The strides of t's leading dimensions, aligned with lead; 0 where it broadcasts."""
    missing = len(lead) - (t.dim() - tail)
    return (0,) * missing + tuple(0 if t.size(d) == 1 else t.stride(d) for d in range(t.dim() - tail))


def owned(t: Tensor, lead: torch.Size, tail: int) -> Strides:
    """A nonzero mark for every leading dimension of more than one element in which t does not broadcast: those of a
    zero-stride view count, for its gradient has a number for each of its elements."""
    sizes = (1,) * (len(lead) - (t.dim() - tail)) + tuple(t.shape[: t.dim() - tail])
    marks, step = [], 1
    for size in reversed(sizes):
        marks.append(0 if size == 1 else step)
        step *= size
    return tuple(reversed(marks))


class TooManyDimensions(Exception):
    """The leading dimensions do not collapse to three."""


class Lead:
    """The leading dimensions of a call, collapsed to three: neighbours that are one walk through memory for every
    tensor become one dimension."""

    def __init__(self, lead: torch.Size, tensors: Sequence[tuple[Tensor, int]]) -> None:
        self.lead = lead
        self._owns: dict[torch.Size, tuple[bool, ...]] = {}
        marks = [owned(t, lead, tail) for t, tail in tensors]
        vectors = marks + [lead_strides(t, lead, tail) for t, tail in tensors]
        self.groups: list[list[int]] = []  # of dimension numbers, outermost first
        for d in reversed(range(len(lead))):
            if lead[d] == 1:
                continue
            if self.groups:
                group = self.groups[0]
                size = math.prod(lead[i] for i in group)
                if all(v[d] == v[group[-1]] * size for v in vectors):
                    group.insert(0, d)
                    continue
            self.groups.insert(0, [d])
        if len(self.groups) > 3:
            raise TooManyDimensions
        self.groups = [[]] * (3 - len(self.groups)) + self.groups
        self.sizes = tuple(math.prod(lead[i] for i in group) for group in self.groups)
        self.count = math.prod(self.sizes)

    def operand(self, t: Tensor, tail: int = 2) -> Operand:
        strides = lead_strides(t, self.lead, tail)
        d0, d1, d2 = (strides[group[-1]] if group else 0 for group in self.groups)
        row = t.stride(-tail) if t.size(-tail) != 1 else 0
        column = 0 if tail == 1 else t.stride(-1) if t.size(-1) != 1 else 0
        return Operand(t, d0, d1, d2, row, column)

    def optional(self, t: Tensor | None, tail: int = 2) -> Operand | None:
        return None if t is None else self.operand(t, tail)

    def owns(self, t: Tensor | None, tail: int = 2) -> tuple[bool, ...]:
        """For each of the three dimensions, whether t has its own rows there."""
        if t is None:
            return (False,) * 3
        sizes = t.shape[: t.dim() - tail]
        if sizes not in self._owns:
            marks = owned(t, self.lead, tail)
            self._owns[sizes] = tuple(bool(group) and marks[group[-1]] != 0 for group in self.groups)
        return self._owns[sizes]

    def sum_to(self, buffer: Tensor, t: Tensor, kept: tuple[bool, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A gradient buffer (k0, k1, k2, rows, columns), whole in the kept dimensions, as t's gradient."""
        extra = [d for d, (k, own) in enumerate(zip(kept, self.owns(t), strict=True)) if k and not own]
        extra += [d - 2 for d in range(2) if t.size(d - 2) == 1 and buffer.size(d - 2) != 1]
        if extra:
            buffer = buffer.sum(extra, dtype=torch.float32)
        return buffer.reshape(t.shape).to(dtype or t.dtype)


def layout(*tensors: Tensor | None) -> tuple[Any, ...]:
    """All that a launch depends on but the addresses: the key under which its preparation is remembered."""
    return tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device.index) for t in tensors)


Key = TypeVar("Key")
Prepared = TypeVar("Prepared")


def remembered(memory: dict[Key, Prepared], key: Key, prepare: Callable[[], Prepared]) -> Prepared:
    """prepare() once for each key: preparing a launch takes the host longer than the GPU needs for a short one."""
    found = memory.get(key)
    if found is None:
        if len(memory) >= 4096:
            memory.clear()
        found = memory[key] = prepare()
    return found


def at_addresses(operands: dict[str, Operand | None], tensors: dict[str, Tensor | None]) -> dict[str, Operand | None]:
    """The same operands for other tensors of the same layout."""
    return {name: None if x is None else Operand(tensors[name], *x[1:]) for name, x in operands.items()}


def dropout_numbers(dropout_p: float) -> dict[str, Any]:
    """Weights whose random word reaches threshold are kept and scaled; with dropout_p = 1 the scale alone drops all."""
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return dict(threshold=threshold, keep_scale=1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)


def tile_count(rows: int, tile: int, sequences: int | None) -> int:
    """Tiles of one batch-head; where rows are packed, enough for every sequence to begin with one of its own."""
    if sequences is None:
        return (rows + tile - 1) // tile
    return rows // tile + sequences if sequences else 0


def is_wide(operands: Iterable[Operand | None], rows: int, columns: int) -> bool:
    """Whether an offset within a tile may need more than 32 bits."""
    return any(abs(x.row) * rows + abs(x.column) * columns >= 2**31 for x in operands if x is not None)


def kind_of(t: Tensor | None, scalars: bool) -> str:
    """How a bias or a mask varies over a tile: "none", "scalar", "row", "column" or "full"."""
    if t is None:
        return "none"
    rows, columns = t.size(-2) != 1, t.size(-1) != 1
    if rows and columns:
        return "full"
    if not scalars:
        return "full" if rows else "column"
    return "row" if rows else "column" if columns else "scalar"


def is_folded(softmax: bool, bias_kind: str, scale: float) -> bool:
    """Whether a softmax takes its scores unscaled, the scale being a factor of the exponent."""
    return softmax and bias_kind == "none" and scale > 1e-30  # not 0 in fp32: 0 times -inf is no number


def diagonal_within(diagonal: int | None, num_targets: int, num_sources: int) -> int:
    """A diagonal that allows the same pairs and stays far from the ends of 32-bit integers."""
    return max(-num_targets, min(diagonal or 0, num_sources))


def expand_all(lead: torch.Size, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Contiguous copies with every leading dimension whole: the slow way for what does not collapse to three."""
    return [None if t is None else t.expand(*lead, *t.shape[-2:]).contiguous() for t in tensors]
