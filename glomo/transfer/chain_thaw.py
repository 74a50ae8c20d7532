"""Chain-thaw: the new layer, then every other one alone from the first on, then all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glomo.transfer.groups import LayerGroup
from glomo.transfer.stages import Stage


def chain_thaw(
    groups: Sequence[LayerGroup], steps: int, lr: float = 1e-3, later_lr: float = 1e-4, patience: int = 5
) -> Iterator[Stage]:
    """The last group at `lr`; then the others, one at a time from the first on, at `later_lr`; then all at `later_lr`.

    Every stage ends after `patience` validations without gain (0: after its steps), goes back to its best weights, and
    begins with fresh moments. `steps` are shared equally among the stages; the last takes what is left.

    Raises:
        ValueError: there are fewer steps than stages.

    Source: Felbo et al., EMNLP 2017, section 3.3; the defaults are those of the authors' code.
    """
    top = groups[-1]
    plan = [(top.name, {top.name: lr})]
    plan += [(group.name, {group.name: later_lr}) for group in groups[:-1]]
    plan.append(("all", {group.name: later_lr for group in groups}))
    each = steps // len(plan)
    if each < 1:
        raise ValueError(f"{steps} steps are too few for {len(plan)} stages; each needs at least one")
    for place, (name, rates) in enumerate(plan):
        count = each if place < len(plan) - 1 else steps - each * (len(plan) - 1)
        yield Stage(name, count, rates, patience=patience, restore=patience > 0, fresh=place > 0)
