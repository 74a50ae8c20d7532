"""Weight decay, off where a penalty already says where the weights are pulled to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glomo.transfer.closeness.anchors import AnchoredPenalty


def without_decay(parameter_groups: Sequence[dict[str, Any]], *penalties: AnchoredPenalty) -> list[dict[str, Any]]:
    """An optimizer's parameter groups in which all that is penalised has `weight_decay` 0, and the rest keeps its own
    (what is penalised with a factor of 0, too).

    Weight decay pulls to zero and a penalty to its anchor: with both, weights end between the two. A group of which a
    part is penalised becomes two, which have the same name, rate and other settings: `Stage.begin` and
    `Stage.set_rates` work as before.

    >>> optimizer = torch.optim.AdamW(without_decay(optimizer_groups(groups, 1e-3, weight_decay=0.01), penalty))

    Raises:
        ValueError: a penalty and the groups have no parameter in common.
    """
    held = set[int]()
    present = {id(parameter) for group in parameter_groups for parameter in group["params"]}
    for penalty in penalties:
        own = {id(parameter) for parameter in penalty.penalised().values()}
        if not own & present:
            raise ValueError(
                f"none of the {len(own)} parameters of {type(penalty).__name__} is among the {len(present)} of the "
                "groups; make both of one model"
            )
        held |= {id(parameter) for parameter in penalty.pulled().values()}
    made = []
    for group in parameter_groups:
        parameters = list(group["params"])
        free = [p for p in parameters if id(p) not in held]
        anchored = [p for p in parameters if id(p) in held]
        if anchored:
            made.append({**group, "params": anchored, "weight_decay": 0.0})
        if free:
            made.append({**group, "params": free})
    return made
