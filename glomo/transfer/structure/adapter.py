"""What an adapter is: a child module that a hook runs whenever its parent is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ORIGINALS = "originals"


class Adapter(nn.Module):
    """A child module of the one that it changes. The parent keeps its class, its parameters and their names; hooks on
    it do the rest. The adapter knows nothing of its parent, so that a copy of the model is whole by itself.

    To make one, write a :class:`SerialAdapter` or a :class:`ParallelAdapter`.

    Args:
        settings: the constructor's arguments, plain values, by which :func:`load_adapters` makes the adapter again.
    """

    mergeable = False
    """whether `merged_weights` has any"""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self._handles: list[RemovableHandle] = []
        self._arguments: tuple[str, ...] = ()

    def attach(self, module: nn.Module) -> None:
        """Put the hooks on the parent."""
        self._arguments = tuple(inspect.signature(module.forward).parameters)
        # what can be merged is a part of the weights: it comes before what reads the output
        self._handles = [module.register_forward_hook(self._called, with_kwargs=True, prepend=self.mergeable)]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def change(self, module: nn.Module, given: Mapping[str, Any], output: Tensor) -> Tensor:
        """What becomes of the parent's output, where it was called with the arguments `given`, by their names."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it changes a module's output")

    def merged_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """{name: value} of the parent's weights with which it alone computes what both do."""
        return {}

    @property
    def merged(self) -> bool:
        """Whether the parent's weights hold what the adapter does."""
        return ORIGINALS in self._modules

    @torch.no_grad()
    def merge_into(self, module: nn.Module) -> None:
        """Give the parent other weights. Its own stay here, as parameters and in the state_dict. A weight that it
        shares with another module is replaced in the parent alone."""
        if self.mergeable and not self.merged:
            originals = nn.ParameterDict()
            for name, value in self.merged_weights(module).items():
                original = module.get_parameter(name)
                originals[name.replace(".", "/")] = original
                _set(module, name, nn.Parameter(value.to(original.dtype), requires_grad=original.requires_grad))
            self.add_module(ORIGINALS, originals)

    def restore(self, module: nn.Module) -> None:
        """Give the parent its own weights back, the same objects."""
        if self.merged:
            for key, original in getattr(self, ORIGINALS).items():
                _set(module, key.replace("/", "."), original)
            delattr(self, ORIGINALS)

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.merged:
            return None
        given = self._given(args, kwargs)
        return on_first(output, lambda first: self.change(module, given, first))

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, by the names in the parent's signature."""
        return {**dict(zip(self._arguments, args, strict=False)), **kwargs}

    def _input(self, given: Mapping[str, Any]) -> Tensor:
        """The first of them: a tensor, or the data of a packed sequence."""
        first = given[self._arguments[0]]
        return first if isinstance(first, Tensor) else first[0]


class SerialAdapter(Adapter):
    """Reads the parent's output and gives what stands in its place: `forward(output) -> output`."""

    def change(self, module: nn.Module, given: Mapping[str, Any], output: Tensor) -> Tensor:
        changed: Tensor = self(output)
        return changed


class ParallelAdapter(Adapter):
    """Reads the parent's first input and gives what is added to its output: `forward(input) -> summand`."""

    def change(self, module: nn.Module, given: Mapping[str, Any], output: Tensor) -> Tensor:
        return output + self.beside(module, given)

    def beside(self, module: nn.Module, given: Mapping[str, Any]) -> Tensor:
        """What is added, where the parent was called with the arguments `given`, by their names."""
        summand: Tensor = self(self._input(given))
        return summand


def on_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with its tensor changed: it, or the first in a tuple (a packed sequence's data).

    Raises:
        TypeError: it is neither.
    """
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple) and output:
        first = on_first(output[0], change)
        if hasattr(output, "_fields"):
            named: Any = output
            return named._replace(**{named._fields[0]: first})
        return first, *output[1:]
    raise TypeError(
        f"an adapter's module returned {type(output).__name__}; a tensor, or a tuple with a tensor first, is needed"
    )


def _set(module: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)
