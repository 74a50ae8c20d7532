"""One small file for all that a task has added to a model: its adapters, its head, the statistics that it trained."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from glomo.errors import UserError
from glomo.transfer.structure.adapter import Adapter
from glomo.transfer.structure.bottleneck import BottleneckAdapter, ParallelBottleneck
from glomo.transfer.structure.insertion import adapters, insert, settle
from glomo.transfer.structure.lora import ConvLoRA, EmbeddingLoRA, LinearLoRA
from glomo.transfer.structure.lora_weights import WeightLoRA
from glomo.transfer.structure.projected_attention import LowRank, ProjectedAttention
from glomo.transfer.structure.residual import ParallelResidual, SerialResidual

FORMAT = 1
_KEY = "glomo.adapters"
_KINDS: dict[str, type[Adapter]] = {
    kind.__name__: kind
    for kind in (
        BottleneckAdapter,
        ConvLoRA,
        EmbeddingLoRA,
        LinearLoRA,
        LowRank,
        ParallelBottleneck,
        ParallelResidual,
        ProjectedAttention,
        SerialResidual,
        WeightLoRA,
    )
}
_DRAW_NOTHING = (SerialResidual, ParallelResidual)
Shapes = dict[str, list[int]]


def save_adapters(
    model: nn.Module,
    path: str | os.PathLike[str],
    head_patterns: str | Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapters, and what the patterns match, into one safetensors file; its metadata holds, as JSON, where
    the adapters belong and how they are made, and the shapes of the base model. A tensor of several names is written
    once. The file is there in full or as it was before.

    Args:
        model: a model with adapters, or the same compiled.
        path: of the file.
        head_patterns: of names in the state_dict, matched at their beginning up to a dot or the name's end: the head,
            and what else of the base was trained, such as LayerNorms, or BatchNorms with their statistics.
        about: plain JSON of the caller's, such as the names of classes, for :func:`about_adapters`.

    Raises:
        ValueError: there are no adapters, one is of a kind of one's own, or merged; a pattern matches nothing.
    """
    model = getattr(model, "_orig_mod", model)
    placed = adapters(model)
    if not placed:
        raise ValueError("the model has no adapters to save")
    entries = []
    for one in placed:
        kind = type(one.adapter)
        if _KINDS.get(kind.__name__) is not kind:
            raise ValueError(f"{one.path!r} is a {kind.__name__}; a file can hold {', '.join(sorted(_KINDS))}")
        if one.adapter.merged:
            raise ValueError(f"{one.path!r} is merged; unmerge(model) first")
        entries.append({"place": one.place, "name": one.name, "kind": kind.__name__, "settings": one.adapter.settings})
    state = _state(model)
    inside = _names(state, [one.path for one in placed])
    head = _matched(set(state) - inside, head_patterns)
    kept = {name: value for name, value in state.items() if name in inside | head}
    base = _shapes({name: value for name, value in state.items() if name not in kept})
    tensors, tied = _once(kept)
    meta = {"format": FORMAT, "adapters": entries, "tied": tied, "base": base, "about": dict(about or {})}
    temporary = Path(f"{os.fspath(path)}.tmp")
    try:
        safetensors.torch.save_file(tensors, temporary, {_KEY: json.dumps(meta)})
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {os.fspath(path)}: {error}") from error


def about_adapters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the caller of :func:`save_adapters` said about a file.

    Raises:
        ValueError: the file is not there, cut, or no such file.
    """
    return dict(_read(path)[1].get("about", {}))


@torch.no_grad()
def load_adapters(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Put the adapters of a file into a base model, and give it the file's head. No random number is drawn.

    Adapters have the dtypes of the file; the head keeps the model's.

    Args:
        model: of the architecture that the file was made with; the weights of its base are not looked at.
        path: a file of :func:`save_adapters`.

    Returns:
        the dotted names of the adapters' modules.

    Raises:
        ValueError: the file is not there, cut, or no such file; a name or a shape in the base or the head is another
            than in the file; a module has an adapter of that name already. The model is then as it was.
    """
    model = getattr(model, "_orig_mod", model)
    tensors, meta = _read(path)
    # a name of several holds its values once
    tensors.update({name: tensors[first] for name, first in meta["tied"].items()})
    entries = meta["adapters"]
    paths = [".".join(filter(None, (entry["place"], entry["name"]))) for entry in entries]
    inside = _names(tensors, paths)
    head = {name: value for name, value in tensors.items() if name not in inside}
    state = _state(model)
    present = _names(state, [one.path for one in adapters(model)])
    _check_free(model, entries, os.fspath(path))
    _check_same(meta["base"], _shapes({n: v for n, v in state.items() if n not in present and n not in head}), path)
    _check_same(_shapes(head), _shapes({name: value for name, value in state.items() if name in head}), path)
    made = [_made(entry) for entry in entries]
    parts = [{key[len(at) + 1 :]: tensors[key] for key in inside if key.startswith(f"{at}.")} for at in paths]
    for adapter, part in zip(made, parts, strict=True):
        _check_same(_shapes(part), _shapes(adapter.state_dict()), path)
    for entry, adapter, part in zip(entries, made, parts, strict=True):
        insert(model.get_submodule(entry["place"]), entry["name"], adapter)
        device = next(adapter.parameters()).device
        # copies: what is read from the file is the file
        adapter.load_state_dict({name: value.to(device, copy=True) for name, value in part.items()}, assign=True)
    for name, first in meta["tied"].items():
        if name in inside and first in inside:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
    for name, value in head.items():
        state[name].copy_(value)
    settle(model)
    return [entry["place"] for entry in entries]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    shown = os.fspath(path)
    try:
        with safetensors.safe_open(shown, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it has no iterator
    except FileNotFoundError:
        raise UserError(f"there is no file {shown}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{shown} is cut, or no safetensors file: {error}") from None
    if text is None:
        raise UserError(f"{shown} holds tensors and no adapters; a file of save_adapters is needed")
    meta = json.loads(text)
    if meta["format"] != FORMAT:
        raise UserError(f"{shown} has format {meta['format']}; this version reads {FORMAT}")
    return tensors, meta


def _made(entry: Mapping[str, Any]) -> Adapter:
    kind, settings = _KINDS[entry["kind"]], dict(entry["settings"])
    if kind not in _DRAW_NOTHING:
        settings["generator"] = torch.Generator()
    return kind(**settings)


def _check_free(model: nn.Module, entries: Sequence[Mapping[str, Any]], shown: str) -> None:
    modules = dict(model.named_modules())
    for entry in entries:
        if entry["kind"] not in _KINDS:
            raise UserError(f"{shown} has a {entry['kind']}; this version knows {', '.join(sorted(_KINDS))}")
        module = modules.get(entry["place"])
        if module is None:
            raise UserError(f"{shown} has an adapter for {entry['place']!r}, and the model no module of that name")
        if hasattr(module, entry["name"]):
            raise UserError(f"{entry['place']!r} has something called {entry['name']!r} already, as {shown} needs it")


def _check_same(saved: Shapes, found: Shapes, path: str | os.PathLike[str]) -> None:
    for name in [*saved, *(name for name in found if name not in saved)]:
        in_file, in_model = (tuple(one[name]) if name in one else "absent" for one in (saved, found))
        if in_file != in_model:
            raise UserError(
                f"{os.fspath(path)} is of another architecture: {name} is {in_file} there and {in_model} in the model"
            )


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict, with the parameters themselves."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {name: list(value.shape) for name, value in state.items()}


def _names(state: Mapping[str, Tensor], paths: Sequence[str]) -> set[str]:
    """The names of what is in the modules of these paths."""
    prefixes = tuple(f"{path}." for path in paths)
    return {name for name in state if name.startswith(prefixes)}


def _matched(names: set[str], patterns: str | Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            compiled = re.compile(rf"(?:{pattern})(?=\.|$)")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        matched = {name for name in names if compiled.match(name)}
        if not matched:
            raise ValueError(f"the head's pattern {pattern!r} matches no name in the base model's state_dict")
        found |= matched
    return found


def _once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors on the CPU, each once, and {name: the first name of the same tensor}."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in state.items():
        if id(value) in first:
            tied[name] = first[id(value)]
            continue
        first[id(value)] = name
        # a clone: views into one storage would count as shared
        tensors[name] = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    return tensors, tied
