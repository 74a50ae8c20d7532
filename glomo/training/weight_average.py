"""[train] average: the mean of a model's weights over the steps, beside the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from glomo.transfer.signal import ExponentialAverage


class WeightAverage(nn.Module):
    """The mean of the weights after step `first` + 1 and all steps behind it, in its state_dict:

    .. code-block:: text

        mean_t = a_t mean_{t-1} + (1 - a_t) w_t,    a_t = min(decay, 1 - 1 / t),   t = 1, 2, ... the step behind `first`

    With decay 1 it is their plain mean (stochastic weight averaging of every step), below 1 an exponential one that
    begins as the plain one. BatchNorm's statistics are averaged like weights.

    Source: Izmailov et al., UAI 2018 (the mean, of every step); Polyak & Juditsky, 1992.
    """

    def __init__(self, model: nn.Module, decay: float, first: int) -> None:
        super().__init__()
        self._held, self.first = (model,), first  # in a tuple it is no child
        self.mean = ExponentialAverage(model, decay, warmup=True)
        self.forget()

    def forget(self) -> None:
        """Begin anew, with the weights that the next step leaves."""
        self.mean.n_averaged.fill_(-1)  # the next update is of no mean yet, and takes the weights as they are

    def update(self, step: int) -> None:
        """Take note of the weights after the step."""
        if step > self.first:
            self.mean.update_parameters(self._held[0])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the mean weights, once there are some."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if self.mean.n_averaged < 0:
            return
        for mean, own in zip(_tensors(self.mean.module), _tensors(self._held[0]), strict=True):
            kept = own.clone()
            own.copy_(mean)
            mean.copy_(kept)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Each parameter and buffer once."""
    return chain(module.parameters(), module.buffers())
