"""Layer groups: a model's parameters from the bottom to the top, each in exactly one group."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


def layer_groups(model: nn.Module, by: Sequence[str] | Mapping[str, str]) -> list[LayerGroup]:
    """The parameters of a model in groups, in the order of the patterns: write them from the bottom to the top.

    A pattern is a regular expression that matches the beginning of a parameter's dotted name, up to a dot or the
    name's end: `"embedding"` takes `embedding.weight` and not `embedding_norm.weight`. A pattern with a group in
    brackets makes one layer group for each text that the brackets match, numbers in their order: `r"layers\\.(\\d+)"`
    makes `layers.0`, `layers.1`, ... A parameter that two modules share counts once, by its first name.

    Args:
        model: any module.
        by: patterns, or {name: pattern}, where a pattern with brackets makes `name.0`, `name.1`, ...

    Returns:
        the groups, each with a name (else what the pattern matched, or the pattern) and its parameters.

    Raises:
        ValueError: a parameter is in no group, or in two; a pattern matches nothing, or is no regular expression; two
            groups would have one name. The message names all of them.
    """
    names = list(by) if isinstance(by, Mapping) else [None] * len(by)
    patterns = list(by.values()) if isinstance(by, Mapping) else list(by)
    compiled = [_compiled(pattern) for pattern in patterns]
    found: list[dict[tuple[str, ...], LayerGroup]] = [{} for _ in patterns]
    missed, doubled = [], []
    for name, parameter in model.named_parameters():
        matches = [(place, match) for place, one in enumerate(compiled) if (match := one.match(name))]
        if not matches:
            missed.append(name)
        elif len(matches) > 1:
            doubled.append(f"{name} (by {' and '.join(repr(patterns[place]) for place, _ in matches)})")
        else:
            place, match = matches[0]
            texts = tuple(text or "" for text in match.groups())
            given = names[place]
            title = ".".join([given, *texts]) if given else match.group() if texts else patterns[place]
            found[place].setdefault(texts, LayerGroup(title, {})).parameters[name] = parameter
    idle = [repr(pattern) for pattern, groups in zip(patterns, found, strict=True) if not groups]
    complaints = [
        f"{what}: {_some(some)}"
        for what, some in (
            ("in no group", missed),
            ("in several groups", doubled),
            ("patterns that match no parameter", idle),
        )
        if some
    ]
    if complaints:
        raise ValueError(
            "every parameter must be in exactly one layer group, and every pattern must match one; "
            + "; ".join(complaints)
        )
    ordered = [groups[texts] for groups in found for texts in sorted(groups, key=_natural)]
    called = [group.name for group in ordered]
    twice = next((name for name in called if called.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two layer groups are called {twice!r}; give the patterns other names")
    return ordered


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:{pattern})(?=\.|$)")
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


def _natural(texts: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """Numbers by their size, other texts by their letters."""
    return [(0, int(text), "") if text.isdigit() else (1, 0, text) for text in texts]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
