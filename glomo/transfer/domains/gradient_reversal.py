"""Gradient reversal: nothing on the way up, the opposite gradient on the way down; and DANN's schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from glomo.nn.precision import at_least_fp32

DANN_RATE = 0.01
"""mu_0, the highest learning rate of DANN's training (SGD, momentum 0.9)"""


def dann_weight(step: int, steps: int, gamma: float = 10.0) -> float:
    """The weight of the reversed gradient, from 0 to (almost) 1:

    .. code-block:: text

        lambda_p = 2 / (1 + exp(-gamma p)) - 1,     p = step / steps, at least 0 and at most 1

    Args:
        step: training steps that are done, over all epochs.
        steps: training steps altogether. An epoch that ends with the shorter of two data sets has as many as that.
        gamma: how fast it grows. With the published 10 it is 0.46 after a tenth of the training; with 1 it would be
            0.46 at the end.

    Raises:
        ValueError: steps is below 1, or gamma not above 0.

    Source: Ganin et al., JMLR 2016, section 5.2.
    """
    _check_schedule(steps, gamma)
    return math.tanh(0.5 * gamma * _done(step, steps))  # the same number, exact for small p too


def dann_rate_factor(step: int, steps: int, alpha: float = 10.0, beta: float = 0.75) -> float:
    """Learning rates of DANN's training, as a factor of the highest rate `DANN_RATE`:

    .. code-block:: text

        mu_p = mu_0 / (1 + alpha p)^beta,     mu_0 = 0.01,     p = step / steps, at least 0 and at most 1

    It fits `glomo.transfer.schedule` and the `factor` of a `Stage`.

    Raises:
        ValueError: steps is below 1.

    Source: Ganin et al., JMLR 2016, section 5.2.
    """
    _check_schedule(steps)
    return math.pow(1 + alpha * _done(step, steps), -beta)


def gradient_reversal(x: Tensor, weight: float | Tensor) -> Tensor:
    """Gradient reversal:

    .. code-block:: text

        forward: x,     backward: -weight * gradient

    Parameters behind it get their usual gradient, parameters before it the opposite one, times the weight.

    Args:
        x: any shape, floating point.
        weight: at least 0; a number, or a tensor of one element (which gets no gradient). Under `torch.compile` a
            tensor may change from step to step without a new compilation.

    Raises:
        TypeError: x is not floating point.
        ValueError: the weight is a negative number, or a tensor of several elements.

    Source: Ganin & Lempitsky, ICML 2015.
    """
    if not x.is_floating_point():
        raise TypeError(f"x has the type {x.dtype}; a gradient needs a floating-point type")
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(f"weight has the shape {tuple(weight.shape)}; one number is needed")
        weight = weight.detach().reshape(())
    else:
        if not weight >= 0:
            raise ValueError(f"weight is {weight}; at least 0 is needed, the sign is turned here")
        weight = torch.tensor(weight, dtype=at_least_fp32(x.dtype))
    reversed_: Tensor = _Reversal.apply(x, weight)
    return reversed_


class GradientReversal(nn.Module):
    """`gradient_reversal` whose weight is `dann_weight` of the training that is done.

    Call `advance()` once after each training step: forward passes (an evaluation, several batches in a step) do not
    count. The step is a buffer, so that a training which was stopped goes on where it was.

    Args:
        steps: training steps altogether.
        gamma: see `dann_weight`.

    Raises:
        ValueError: steps is below 1, or gamma not above 0.

    Source: Ganin et al., JMLR 2016, section 5.2.
    """

    step: Tensor

    def __init__(self, steps: int, gamma: float = 10.0) -> None:
        super().__init__()
        _check_schedule(steps, gamma)
        self.steps = steps
        self.gamma = gamma
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def weight(self) -> Tensor:
        """The weight at this step, on the device of the module: a tensor without dimensions, fp32."""
        done = (self.step.float() / self.steps).clamp(0, 1)
        return torch.tanh(0.5 * self.gamma * done)

    def advance(self) -> None:
        """One training step is done."""
        self.step += 1

    def forward(self, x: Tensor) -> Tensor:
        return gradient_reversal(x, self.weight)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, gamma={self.gamma}"


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return -weight * grads[0], None


def _done(step: int, steps: int) -> float:
    return min(1.0, max(0.0, step / steps))


def _check_schedule(steps: int, gamma: float = 1.0) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; the training needs at least 1")
    if not gamma > 0:
        raise ValueError(f"gamma is {gamma}; above 0 is needed, or the weight does not grow")
