"""Sequential unfreezing with an auxiliary language model's loss whose weight is annealed (SiATL)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from glomo.transfer.groups import LayerGroup
from glomo.transfer.stages import Stage


def sequential_unfreezing(
    groups: Sequence[LayerGroup],
    steps: int,
    epoch_steps: int,
    lr: float = 5e-4,
    lower_lr: float = 5e-4,
    n: int = 2,
    k: int = 5,
) -> Iterator[Stage]:
    """In the epochs before epoch n the last group learns, before epoch k all but the first (the embedding), then all:

    .. code-block:: text

        epochs 1 .. n-1     last group
        epochs n .. k-1     all but the first
        epochs k ..         all

    The last group learns at `lr`, the others at `lower_lr`. The loss is L_task + `auxiliary_weight(epoch)` L_LM.

    Raises:
        ValueError: not 1 <= n <= k; fewer than two groups; the first stages leave nothing of `steps`.

    Source: Chronopoulou et al., NAACL 2019.
    """
    if not 1 <= n <= k:
        raise ValueError(f"n is {n} and k {k}; 1 <= n <= k is needed")
    if len(groups) < 2:
        raise ValueError(f"sequential unfreezing needs two layer groups or more, and there is {len(groups)}")
    last = steps - (k - 1) * epoch_steps
    if last < 1:
        raise ValueError(
            f"{k - 1} epochs of {epoch_steps} steps leave nothing of {steps} steps for the last stage; at least "
            f"{(k - 1) * epoch_steps + 1} are needed"
        )
    rates = {group.name: lower_lr for group in groups} | {groups[-1].name: lr}
    parts = [("last", groups[-1:], (n - 1) * epoch_steps), ("no embedding", groups[1:], (k - n) * epoch_steps)]
    for name, learning, count in [*parts, ("all", groups, last)]:
        if count:
            yield Stage(name, count, {group.name: rates[group.name] for group in learning})


def auxiliary_weight(epoch: int, epochs: int = 15) -> float:
    """The weight of the language model's loss in an epoch counted from 0; constant after `epochs`:

    .. code-block:: text

        gamma_e = exp(-1.6 - 0.7 e / (epochs - 1)),   e = min(epoch, epochs - 1)

    which falls from 0.202 to 0.100.
    """
    return math.exp(-1.6 - 0.7 * min(epoch, epochs - 1) / max(1, epochs - 1))
