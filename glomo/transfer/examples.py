"""Reading a model's outputs: what a batch is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glomo.transfer.modes import evaluating

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a model is called with, examples first: one tensor, several in their order, or several by name."""


def inputs_and_labels(batch: Any) -> tuple[Inputs, Tensor | None]:
    """A batch is a tensor or a mapping of inputs alone, or a pair (inputs, labels).

    Raises:
        TypeError: it is something else.
    """
    labels = None
    if isinstance(batch, tuple | list):
        if len(batch) != 2:
            raise TypeError(
                f"a batch is a {type(batch).__name__} of {len(batch)}; inputs alone or a pair (inputs, labels) is "
                "needed, with several inputs in a tuple of their own"
            )
        batch, labels = batch
    if isinstance(batch, Mapping):
        return dict(batch), labels
    if isinstance(batch, tuple | list):
        return tuple(batch), labels
    if not isinstance(batch, Tensor):
        raise TypeError(f"a batch's inputs are a {type(batch).__name__}; a tensor, a tuple or a mapping is needed")
    return batch, labels


def outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """model(inputs).

    Raises:
        TypeError: it is no tensor.
    """
    if isinstance(inputs, dict):
        return check_tensor(model(**inputs))
    return check_tensor(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def all_outputs(model: nn.Module, batches: Iterable[Inputs]) -> Tensor:
    """The model's outputs (N, ...) on the CPU, without gradients, of all examples in their order, in evaluation mode;
    afterwards its modules have their own modes again.

    Raises:
        TypeError: an output is no tensor.
        ValueError: there is no example; outputs are not one row for each, or of different shapes.
    """
    found: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for inputs in batches:
            output, needed = outputs(model, inputs), count(inputs)
            if not output.dim() or len(output) != needed:
                raise ValueError(
                    f"the model returns an output of shape {tuple(output.shape)} for {needed} examples; one row for "
                    "each is needed"
                )
            if found and output.shape[1:] != found[0].shape[1:]:
                raise ValueError(
                    f"outputs of an example are {tuple(found[0].shape[1:])} in one batch and "
                    f"{tuple(output.shape[1:])} in another; one shape is needed"
                )
            found.append(output.cpu())
    if not sum(map(len, found)):
        raise ValueError("batches hold no example; at least 1 is needed")
    return torch.cat(found)


def check_tensor(found: Any) -> Tensor:
    """Raises TypeError unless it is a tensor."""
    if not isinstance(found, Tensor):
        raise TypeError(f"the model returns a {type(found).__name__}; a tensor of outputs (examples, ...) is needed")
    return found


def count(inputs: Inputs) -> int:
    """How many examples."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    return len(next(iter(inputs.values() if isinstance(inputs, dict) else inputs)))


def rows(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Some of the examples."""
    if isinstance(inputs, dict):
        return {name: x[start:stop] for name, x in inputs.items()}
    return tuple(x[start:stop] for x in inputs) if isinstance(inputs, tuple) else inputs[start:stop]
