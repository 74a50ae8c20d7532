"""Tensors as the C++ kernels take them: inputs with all leading dimensions, and what their gradients are written to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import at_least_2d


def unless_empty(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


def with_lead(lead: Sequence[int], *tensors: Tensor | None) -> list[Tensor | None]:
    """Views with all leading dimensions; the last two stay as they are: a bias or a mask may broadcast there."""
    views = [at_least_2d(t) for t in tensors]
    return [t if t is None or t.shape[:-2] == lead else t.expand(*lead, *t.shape[-2:]) for t in views]


def empty_rows(like: Tensor, shape: Sequence[int], inside: bool, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the shape (..., T, E); inside: (B, H, T, E) with the heads side by side in memory."""
    if inside and len(shape) == 4:
        return like.new_empty(shape[0], shape[2], shape[1], shape[3], dtype=dtype).transpose(1, 2)
    return like.new_empty(shape, dtype=dtype)


def gradient_buffer(
    t: Tensor | None, lead: Sequence[int], need: bool, wide: bool = False, inside: bool = False
) -> Tensor | None:
    """Zeros for the gradient of t, with all leading dimensions: in fp32 where it is still to be summed over some of
    them, or where asked for; else, where asked for, with the heads `inside`."""
    if t is None or not need:
        return None
    broadcast = t.shape[:-2] != lead
    dtype = torch.float32 if wide or broadcast else t.dtype
    return empty_rows(t, (*lead, *t.shape[-2:]), inside and not broadcast, dtype).zero_()


class BiasSums:
    """For the gradient of a bias: a number for each pair, target or source, as the bias varies; None without a bias.

    With `in_turns` the kernel adds up a bias of all pairs that several batch-heads share; else the sum follows here.
    """

    def __init__(
        self, bias: Tensor | None, lead: Sequence[int], rows: int, columns: int, like: Tensor, in_turns: bool = False
    ) -> None:
        self.outputs: list[Tensor | None] = [None, None, None]  # per pair, per target, per source
        self.total: Tensor | None = None
        if bias is None:
            return
        per_target, per_source = (n == 1 for n in reversed((1, 1, *bias.shape)[-2:]))
        shape = (rows, 1) if per_target else (1, columns) if per_source else (rows, columns)
        whole = in_turns and not per_target and not per_source
        own = (*(1,) * (len(lead) + 2 - bias.dim()), *bias.shape[:-2]) if whole else lead
        self.total = like.new_zeros(*own, *shape, dtype=torch.float32)
        self.outputs[1 if per_target else 2 if per_source else 0] = self.total.expand(*lead, *shape)


def summed(gradient: Tensor | None, t: Tensor | None, like: Tensor) -> Tensor:
    """The gradient in the shape and dtype of t; where there is none an empty tensor (a custom op must return some)."""
    if gradient is None or t is None:
        return like.new_empty(0)
    if gradient.shape != t.shape:
        gradient = gradient.sum_to_size((1, 1, *t.shape)[-max(t.dim(), 2) :]).reshape(t.shape)
    return gradient.to(t.dtype)
