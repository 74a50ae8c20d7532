"""Full fine-tuning: one stage in which everything learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glomo.transfer.groups import LayerGroup
from glomo.transfer.rates import discriminative_rates
from glomo.transfer.schedules import Factor, constant
from glomo.transfer.stages import Stage


def full(
    groups: Sequence[LayerGroup], steps: int, lr: float, factor: float = 1.0, schedule: Factor = constant
) -> Iterator[Stage]:
    """All groups learn, at `discriminative_rates(groups, lr, factor)`: with the factor 1 at one rate."""
    yield Stage("full", steps, discriminative_rates(groups, lr, factor), schedule)
