"""Layer groups: a model's parameters from the bottom to the top, each in exactly one group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LayerGroup:
    """Some of a model's parameters, by their names."""

    name: str
    parameters: dict[str, nn.Parameter]

    @property
    def size(self) -> int:
        """Numbers in the parameters."""
        return sum(p.numel() for p in self.parameters.values())


def layer_groups(model: nn.Module, by: Sequence[str]) -> list[LayerGroup]:
    """The parameters of a model in groups, in the order of the patterns: write them from the bottom to the top.

    A pattern is a regular expression that matches the beginning of a parameter's dotted name, up to a dot or the
    name's end: `"embedding"` takes `embedding.weight` and not `embedding_norm.weight`. A pattern with a group in
    brackets makes one layer group for each text that the brackets match, numbers in their order: `r"layers\\.(\\d+)"`
    makes `layers.0`, `layers.1`, ... A parameter that two modules share counts once, by its first name.

    Args:
        model: any module.
        by: patterns.

    Returns:
        the groups, each with a name (what the pattern matched) and its parameters.

    Raises:
        ValueError: a parameter is in no group, or in two; a pattern matches nothing. The message names all of them.
    """
    compiled = [re.compile(rf"(?:{pattern})(?=\.|$)") for pattern in by]
    found: list[dict[tuple[str, ...], LayerGroup]] = [{} for _ in by]
    missed, doubled = [], []
    for name, parameter in model.named_parameters():
        matches = [(place, match) for place, one in enumerate(compiled) if (match := one.match(name))]
        if not matches:
            missed.append(name)
        elif len(matches) > 1:
            doubled.append(f"{name} (by {' and '.join(repr(by[place]) for place, _ in matches)})")
        else:
            place, match = matches[0]
            texts = tuple(text or "" for text in match.groups())
            group = found[place].setdefault(texts, LayerGroup(match.group() if texts else by[place], {}))
            group.parameters[name] = parameter
    idle = [repr(pattern) for pattern, groups in zip(by, found, strict=True) if not groups]
    complaints = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("in no group", missed),
            ("in several groups", doubled),
            ("patterns that match no parameter", idle),
        )
        if names
    ]
    if complaints:
        raise ValueError(
            "every parameter must be in exactly one layer group, and every pattern must match one; "
            + "; ".join(complaints)
        )
    return [groups[texts] for groups in found for texts in sorted(groups, key=_natural)]


def _natural(texts: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """Numbers by their size, other texts by their letters."""
    return [(0, int(text), "") if text.isdigit() else (1, 0, text) for text in texts]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
