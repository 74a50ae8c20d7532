"""Looking at a model without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glomo.transfer.modes import evaluating

Place = Callable[[nn.Module, str], RemovableHandle]


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """`evaluating`, without gradients and without PyTorch's fused encoder layers, which go past the modules that hooks
    look at."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def hooked(modules: Mapping[str, nn.Module], place: Place) -> Iterator[None]:
    """`place` puts a hook on each module and returns what removes it; afterwards all are removed."""
    handles: list[RemovableHandle] = []
    try:
        for name, module in modules.items():
            handles.append(place(module, name))
        yield
    finally:
        for handle in handles:
            handle.remove()


def named(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """Submodules by name. Raises ValueError for a name that is none."""
    found = dict(model.named_modules())
    for name in names:
        if name not in found:
            known = ", ".join(list(found)[1:8]) + (", ..." if len(found) > 8 else "")
            raise ValueError(f"the model has no module {name!r}; its modules are {known or 'none'}")
    return {name: found[name] for name in names}


def first_tensor(output: Any) -> Tensor | None:
    """The output itself, or the first part of a tuple, a list or a mapping that is one; None where there is none."""
    while isinstance(output, (tuple, list, Mapping)) and len(output):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output if isinstance(output, Tensor) else None


def numbered(name: str, call: int) -> str:
    """The name of a module's first call in a forward pass, and of later ones: `name`, `name (2)`, ..."""
    return name if call == 1 else f"{name} ({call})"
