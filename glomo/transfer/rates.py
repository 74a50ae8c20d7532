"""Discriminative fine-tuning: a learning rate for every layer group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from glomo.transfer.groups import LayerGroup

FACTOR = 2.6


def discriminative_rates(groups: Sequence[LayerGroup], lr: float, factor: float = FACTOR) -> dict[str, float]:
    """{group: its rate}, `lr` for the last group and `factor` times less from each to the one below it:

    .. code-block:: text

        eta^{l-1} = eta^l / factor

    Raises:
        ValueError: lr is negative, or factor not positive.

    Source: Howard & Ruder, ACL 2018, section 3.2.
    """
    if not (lr >= 0 and factor > 0):
        raise ValueError(f"lr is {lr} and factor {factor}; a rate of at least 0 and a positive factor are needed")
    top = len(groups) - 1
    return {group.name: lr / factor ** (top - place) for place, group in enumerate(groups)}


def optimizer_groups(
    groups: Sequence[LayerGroup], rates: Mapping[str, float] | float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for a `torch.optim` optimizer, made once and never added to: freezing changes `requires_grad`.

    Each has its layer group's name under "name" and its rate as "lr". With a weight decay there are two for a layer
    group, one of its matrices and one of the rest, which does not decay.

    >>> optimizer = torch.optim.AdamW(optimizer_groups(groups, discriminative_rates(groups, 1e-2)))
    """
    made = []
    if not isinstance(rates, (int, float)):
        absent = [group.name for group in groups if group.name not in rates]
        if absent:
            raise ValueError(f"there is no rate for the layer group {absent[0]!r}; rates are for {', '.join(rates)}")
    for group in groups:
        lr = rates if isinstance(rates, (int, float)) else rates[group.name]
        parts: list[tuple[list[nn.Parameter], float]] = [(list(group.parameters.values()), 0.0)]
        if weight_decay:
            parts = [
                ([p for p in group.parameters.values() if p.dim() >= 2], weight_decay),
                ([p for p in group.parameters.values() if p.dim() < 2], 0.0),
            ]
        made += [
            {"params": params, "name": group.name, "lr": lr, "weight_decay": decay} for params, decay in parts if params
        ]
    return made
