"""Gradual unfreezing: the last group first, then one more below it in each stage, at last all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glomo.transfer.groups import LayerGroup
from glomo.transfer.rates import FACTOR, discriminative_rates
from glomo.transfer.schedules import Factor, constant
from glomo.transfer.stages import Stage


def gradual_unfreezing(
    groups: Sequence[LayerGroup],
    steps: int,
    stage_steps: int,
    lr: float,
    factor: float = FACTOR,
    depth: int | None = None,
    schedule: Factor = constant,
    last_schedule: Factor | None = None,
    restart: bool = False,
) -> Iterator[Stage]:
    """Stages of `stage_steps` (one epoch, as published) that train the last group, the last two, ...; the final stage
    trains all for the rest of `steps`. Rates are `discriminative_rates(groups, lr, factor)` in every stage.

    Args:
        groups: from the bottom to the top.
        steps: of all stages together.
        stage_steps: of every stage but the final one.
        lr: highest rate of the last group.
        factor: from one group to the next.
        depth: how many stages there are before the final one; None: one for each group but the first, as published.
            The authors' own scripts have 2.
        schedule: over all stages, or over each of them with `restart`.
        last_schedule: of the final stage where it differs, which needs `restart`.
        restart: begin the schedule anew in every stage.

    Raises:
        ValueError: the stages before the final one leave nothing of `steps`; depth is not from 0 to the number of
            groups less one.

    Source: Howard & Ruder, ACL 2018, section 3.3.
    """
    depth = len(groups) - 1 if depth is None else depth
    if not 0 <= depth < len(groups):
        raise ValueError(f"depth is {depth}; of {len(groups)} layer groups 0 to {len(groups) - 1} can come first")
    last = steps - depth * stage_steps
    if last < 1:
        raise ValueError(
            f"{depth} stages of {stage_steps} steps leave nothing of {steps} steps for the final one; at least "
            f"{depth * stage_steps + 1} are needed"
        )
    rates = discriminative_rates(groups, lr, factor)
    for count in range(1, depth + 1):
        learning = {group.name: rates[group.name] for group in groups[-count:]}
        first, span = (0, None) if restart else ((count - 1) * stage_steps, steps)
        yield Stage(f"last {count}" if count > 1 else "last", stage_steps, learning, schedule, first, span)
    first, span = (0, None) if restart else (depth * stage_steps, steps)
    yield Stage("all", last, rates, last_schedule or schedule, first, span)
