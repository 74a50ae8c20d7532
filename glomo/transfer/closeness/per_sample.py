"""Squares of gradients, taken example by example before they are summed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from glomo.nn.precision import at_least_fp32
from glomo.transfer.examples import Inputs, rows

Value = Callable[[nn.Module, Inputs, Tensor], Tensor]
"""(model, inputs, labels) -> a number for each example (examples,)."""

_NUMBERS = 2**26
"""As many numbers of gradients are alive at a time at most: so many examples at once, one at least."""


class SquaredGradients:
    """The sums

    .. code-block:: text

        sum_n weight_n (d value(x_n, y_n) / d theta)^2

    for every floating-point parameter of the model, trained or frozen; a tied one has one gradient, a parameter that
    the value does not depend on has zero.

    Gradients of many examples are taken at once by `torch.func.vmap(torch.func.grad(...))` where the model allows it,
    else by a loop over single examples: the first example is always done both ways, and the loop goes on alone where
    they differ or vmap raises. Both give the same numbers up to rounding.
    """

    def __init__(self, model: nn.Module, value: Value) -> None:
        self.model, self.value = model, value
        self.parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        self.sums = {name: torch.zeros_like(p, dtype=at_least_fp32(p.dtype)) for name, p in self.parameters.items()}
        # not known yet; a recurrent layer's steps of all examples at once take several times the memory and the time
        self.vectorised: bool | None = False if _recurrent(model) else None
        self._whole = _Valued(model, value)

    def add(self, inputs: Inputs, labels: Tensor, weights: Tensor) -> None:
        """The examples of a batch; labels and weights have a row for each."""
        at_once = max(1, _NUMBERS // max(1, sum(p.numel() for p in self.parameters.values())))
        for start in range(0, len(labels), at_once):
            stop = min(start + at_once, len(labels))
            with _recurrent_gradients(self.model):
                self._add(rows(inputs, start, stop), labels[start:stop], weights[start:stop])

    def _add(self, inputs: Inputs, labels: Tensor, weights: Tensor) -> None:
        gradients = None if self.vectorised is False else self._together(inputs, labels)
        if self.vectorised is None:
            first = self._alone(rows(inputs, 0, 1), labels[:1])
            self.vectorised = gradients is not None and _agree({n: g[0] for n, g in gradients.items()}, first)
        if gradients is None or not self.vectorised:
            self.vectorised = False
            for n in range(len(labels)):
                self._take(self._alone(rows(inputs, n, n + 1), labels[n : n + 1]), weights[n])
        else:
            self._take_all(gradients, weights)

    def _take(self, gradients: dict[str, Tensor], weight: Tensor) -> None:
        for name, gradient in gradients.items():
            squares = gradient.to(self.sums[name].dtype).square()
            self.sums[name] += weight.to(squares) * squares

    def _take_all(self, gradients: dict[str, Tensor], weights: Tensor) -> None:
        for name, gradient in gradients.items():
            squares = gradient.to(self.sums[name].dtype).square()
            self.sums[name] += torch.einsum("n,n...->...", weights.to(squares), squares)

    def _alone(self, inputs: Inputs, labels: Tensor) -> dict[str, Tensor]:
        """The gradient of one example."""
        parameters = list(self.parameters.values())
        with torch.enable_grad(), _learning(parameters):
            value = self.value(self.model, inputs, labels).sum()
            found = (
                torch.autograd.grad(value, parameters, allow_unused=True)
                if value.requires_grad
                else [None] * len(parameters)
            )
        return {
            name: torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
            for (name, p), g in zip(self.parameters.items(), found, strict=True)
        }

    def _together(self, inputs: Inputs, labels: Tensor) -> dict[str, Tensor] | None:
        """{name: (examples, *shape)}, None where it cannot be done."""

        def one(parameters: dict[str, Tensor], inputs: Inputs, label: Tensor) -> Tensor:
            single = _with_dimension(inputs)
            return torch.func.functional_call(self._whole, parameters, (single, label[None])).sum()

        parameters = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")
                found = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(parameters, inputs, labels)
        except Exception:  # of many kinds; the loop raises again what is a mistake of the caller
            return None
        return {name: found[f"model.{name}"] for name in self.parameters}


class _Valued(nn.Module):
    """The value as a module, for `functional_call`."""

    def __init__(self, model: nn.Module, value: Value) -> None:
        super().__init__()
        self.model, self.value = model, value

    def forward(self, inputs: Inputs, labels: Tensor) -> Tensor:
        return self.value(self.model, inputs, labels)


def _with_dimension(inputs: Inputs) -> Inputs:
    if isinstance(inputs, dict):
        return {name: x[None] for name, x in inputs.items()}
    return tuple(x[None] for x in inputs) if isinstance(inputs, tuple) else inputs[None]


def _agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two gradients are the same up to rounding."""
    largest = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    for name, gradient in expected.items():
        if not gradient.numel():
            continue
        epsilon = torch.finfo(gradient.dtype).eps
        allowed = epsilon**0.5 * float(gradient.abs().max()) + 100 * epsilon * largest
        if not float((found[name] - gradient).abs().max()) <= allowed:
            return False
    return True


@contextmanager
def _learning(parameters: list[nn.Parameter]) -> Iterator[None]:
    """All of them require a gradient; afterwards those that did before."""
    before = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, learning in zip(parameters, before, strict=True):
            parameter.requires_grad_(learning)


@contextmanager
def _recurrent_gradients(model: nn.Module) -> Iterator[None]:
    """cuDNN's recurrent layers have no gradient in evaluation mode; PyTorch's own do."""
    if _recurrent(model):
        with torch.backends.cudnn.flags(enabled=False):
            yield
    else:
        yield


def _recurrent(model: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in model.modules())
