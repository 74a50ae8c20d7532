"""Adapters into any module and out of it, and the layer groups to train them by."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from glomo.transfer.structure.adapter import Adapter

Make = Callable[[nn.Module, str], Adapter]
"""(module, its dotted name) -> an adapter for it."""
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_WAS_NESTED = "_nested_without_adapters"


class Placed(NamedTuple):
    """An adapter in a model."""

    place: str
    """dotted name of its parent"""
    module: nn.Module
    """its parent"""
    name: str
    """its name there"""
    adapter: Adapter

    @property
    def path(self) -> str:
        """Dotted name of the adapter."""
        return f"{self.place}.{self.name}" if self.place else self.name


def add(model: nn.Module, where: str, make: Make, name: str = "adapter") -> list[str]:
    """Put an adapter into each of the modules that `where` names:

    .. code-block:: text

        module.<name> = make(module, its dotted name),   a hook on the module changes its output

    Nothing else of the model changes: no class, no parameter, no name of one. It can be copied, saved and compiled as
    before. An output is a tensor, or a tuple with the tensor first, as an LSTM's or an attention's; a packed sequence
    is one, too. An adapter has the device and the dtype of its module's weights, and is in training mode if that is.

    Args:
        model: any module; the whole one, if PyTorch's `nn.TransformerEncoder` is around the modules (it must be told).
        where: a regular expression that matches the whole of a module's dotted name: `r"layers\\.\\d+\\.out"`, and
            `r".*\\.query"` for all that end so; an empty one is the model itself. Modules in adapters do not count.
        make: `bottleneck()`, `lora()` and the like, or a function of one's own; called from the bottom to the top.
        name: of the child module. Several adapters on one module need one each. They act in their order, after those
            that :func:`merge` can put into the weights.

    Returns:
        the dotted names of the modules.

    Raises:
        ValueError: nothing matches; there is something of that name in a module; a module never gets called, or calls
            all of its children. The model is then as it was.
        TypeError: what `make` returned is no adapter.
    """
    if not name or "." in name:
        raise ValueError(f"name is {name!r}; one without dots is needed")
    found = _matching(model, where)
    projections = {id(m.out_proj): at for at, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    made = []
    for place, module in found.items():
        if id(module) in projections:
            raise ValueError(
                f"{place!r} is never called, its weights are read by the attention around it; name "
                f"{projections[id(module)]!r}"
            )
        _check_target(place, module, name)
        adapter = make(module, place)
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"make returned {type(adapter).__name__} for {place!r}; a SerialAdapter or a ParallelAdapter is needed"
            )
        made.append((module, adapter))
    for module, adapter in made:
        insert(module, name, adapter)
    settle(model)
    return list(found)


def insert(module: nn.Module, name: str, adapter: Adapter) -> None:
    """One adapter into one module; call `settle` after the last."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is not None:
        adapter.to(weight.device, weight.dtype)
    adapter.attach(module)
    module.add_module(name, adapter.train(module.training))


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take the adapters of that name out, or all: the model is then what it was before them, to the bit. What is
    merged is unmerged first. Frozen parameters stay frozen.

    Raises:
        ValueError: there are none.
    """
    placed = adapters(model)
    chosen = [one for one in placed if name in (None, one.name)]
    if not chosen:
        called = "" if name is None else f" called {name!r}"
        raise ValueError(f"there is no adapter{called}; there are {_some([one.path for one in placed])}")
    for one in reversed(placed):  # what was merged last is on top
        if any(one.module is other.module for other in chosen):
            one.adapter.restore(one.module)
    take_out(model, chosen)


def take_out(model: nn.Module, placed: Sequence[Placed]) -> None:
    """Adapters out of their modules, whose weights stay as they are."""
    for one in placed:
        one.adapter.detach()
        delattr(one.module, one.name)
    settle(model)


def adapters(model: nn.Module) -> list[Placed]:
    """All adapters, from the bottom to the top, those of one module in their order."""
    return [
        Placed(place, module, name, child)
        for place, module in model.named_modules()
        for name, child in module.named_children()
        if isinstance(child, Adapter)
    ]


def adapter_patterns(
    model: nn.Module, head: str | Sequence[str] = (), also: str | Sequence[str] = ()
) -> dict[str, str]:
    """{"base": ..., "adapters": ..., "head": ...} for :func:`glomo.transfer.layer_groups`, so that a technique can
    train the adapters and the head and freeze the base:

    .. code-block:: text

        groups = layer_groups(model, adapter_patterns(model, head="classifier", also=r".*norm"))
        stages = freeze_all_but_top(groups, steps, lr, count=2)

    Args:
        model: a model with adapters.
        head: patterns of the parameters of the head, which match the beginning of a dotted name up to a dot or the
            name's end; none: there is no such group.
        also: patterns of other parameters of the base that learn with the adapters (Houlsby et al. train LayerNorms).

    Raises:
        ValueError: there are no adapters; a pattern is no regular expression, or has brackets that make groups.
    """
    paths = [re.escape(one.path) for one in adapters(model)]
    if not paths:
        raise ValueError("the model has no adapters; add some first")
    inside = _either(paths)
    top, beside = _either(_checked(head)), _either(_checked(also))
    patterns = {"base": _but([inside, top, beside], ".+"), "adapters": _either([inside, _but([top], beside)])}
    return {**patterns, "head": _but([inside], top)} if top else patterns


def settle(model: nn.Module) -> None:
    """Where torch's encoder has adapters in it, it must not make a nested tensor of a padded batch: its layers could
    then not be differentiated, and their modules would get the nested tensor."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            adapted = any(isinstance(inner, Adapter) for inner in module.modules())
            if adapted and module.use_nested_tensor:
                module.use_nested_tensor = False
                setattr(module, _WAS_NESTED, True)
            elif not adapted and module.__dict__.pop(_WAS_NESTED, False):
                module.use_nested_tensor = True


def _matching(model: nn.Module, where: str) -> dict[str, nn.Module]:
    """{dotted name: module} of what is matched; a module of several names counts once, by its first."""
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise ValueError(f"where is {where!r}, which is no regular expression: {error}") from None
    inside = {id(inner) for one in adapters(model) for inner in one.adapter.modules()}
    named = {name: m for name, m in model.named_modules(remove_duplicate=False) if id(m) not in inside}
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in named.items():
        if pattern.fullmatch(name):
            found.setdefault(id(module), (name, module))
    if not found:
        raise ValueError(f"where is {where!r}, and no module is called so; there are {_some([n for n in named if n])}")
    return dict(found.values())


def _check_target(place: str, module: nn.Module, name: str) -> None:
    called = f"{place!r}, a {type(module).__name__},"
    if isinstance(module, _NEVER_CALLED):
        raise ValueError(f"{called} is never called; name the modules in it")
    if isinstance(module, nn.Sequential):
        raise ValueError(f"{called} would call the adapter as one of its own layers; name the modules in it")
    if isinstance(getattr(module, name, None), Adapter):
        raise ValueError(f"{called} has an adapter called {name!r} already; give the new one another name")
    if hasattr(module, name):
        raise ValueError(f"{called} has something called {name!r} already; give the adapter another name")


def _checked(patterns: str | Sequence[str]) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        if groups:
            raise ValueError(f"the pattern {pattern!r} has brackets that make groups; write (?:...) in their place")
    return patterns


def _either(patterns: Sequence[str]) -> str:
    return "|".join(f"(?:{pattern})" for pattern in patterns if pattern)


def _but(others: Sequence[str], pattern: str) -> str:
    """The pattern where none of the others match; an empty one matches nothing."""
    other = _either(others)
    return rf"(?!(?:{other})(?:\.|$))(?:{pattern})" if pattern and other else pattern


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
