"""Stages of a fine-tuning: which layer groups learn, at which rates, and for how long.

A technique (`gradual_unfreezing`, `chain_thaw`, ...) is an iterable of stages. The training loop runs them, and so does
a loop of one's own::

    groups = layer_groups(model, [r"embedding", r"layers\\.(\\d+)", r"head"])
    optimizer = torch.optim.AdamW(optimizer_groups(groups, 1e-3))
    for stage in gradual_unfreezing(groups, steps=300, stage_steps=50, lr=1e-3):
        stage.begin(model, groups, optimizer)
        for step in range(stage.steps):
            stage.set_modes(model)
            stage.set_rates(optimizer, step)
            ...  # loss, backward, optimizer.step()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from glomo.transfer.groups import LayerGroup
from glomo.transfer.schedules import Factor, constant


@dataclass(frozen=True)
class Stage:
    """One stage. Frozen groups get no gradient, no step and no weight decay.

    What is not learned in the frozen part: the statistics of a frozen BatchNorm stay as they are (it is in evaluation
    mode); dropout there works as in training, unless `frozen` is "eval". A module without parameters counts as frozen
    where the nearest module around it that has some is.
    """

    name: str
    steps: int
    """at most; fewer with `patience`"""
    rates: Mapping[str, float]
    """{name of a layer group that learns: its highest rate}"""
    factor: Factor = constant
    """schedule: (step, steps) -> factor of the rates"""
    first: int = 0
    """step of the schedule at which the stage begins, of a schedule that spans several stages"""
    span: int | None = None
    """steps of the whole schedule; None: the stage's"""
    patience: int = 0
    """the stage ends after so many validations without gain; 0: after its steps"""
    restore: bool = False
    """at its end go back to the stage's best validated weights"""
    fresh: bool = False
    """the optimizer forgets its moments first"""
    frozen: Literal["train", "eval"] = "train"
    """mode of the frozen modules: "eval" also switches their dropout off"""

    def begin(self, model: nn.Module, groups: Sequence[LayerGroup], optimizer: torch.optim.Optimizer) -> None:
        """Let this stage's groups learn, and no other parameter of theirs.

        Raises:
            ValueError: the stage trains nothing, or names a group that is not there; the optimizer was not made by
                `optimizer_groups` of these groups.
        """
        check_stage(self, groups)
        named = {group.get("name") for group in optimizer.param_groups}
        absent = [group.name for group in groups if group.parameters and group.name not in named]
        if absent:
            raise ValueError(
                f"the optimizer has no parameter group named {absent[0]!r}; make it of optimizer_groups(groups, lr)"
            )
        for group in groups:
            for parameter in group.parameters.values():
                parameter.requires_grad_(group.name in self.rates)
                if not parameter.requires_grad:
                    parameter.grad = None
        if self.fresh:
            optimizer.state.clear()

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int, scale: float = 1.0) -> None:
        """The rates of the step (counted from 0 in the stage), times scale."""
        factor = scale * self.factor(self.first + step, self.span or self.steps)
        for group in optimizer.param_groups:
            group["lr"] = factor * self.rates.get(group["name"], 0.0)

    def set_modes(self, model: nn.Module) -> None:
        """`model.train()`, but for what is frozen."""
        model.train()
        _set_modes(model, False, self.frozen == "eval")


def check_stage(stage: Stage, groups: Sequence[LayerGroup]) -> None:
    """Raises ValueError for a stage that trains nothing or names a group that is not there."""
    sizes = {group.name: group.size for group in groups}
    for name in stage.rates:
        if name not in sizes:
            raise ValueError(f"stage {stage.name!r} trains {name!r}, but the layer groups are {', '.join(sizes)}")
    if not sum(sizes[name] for name in stage.rates):
        named = ", ".join(stage.rates)
        what = f"nothing that can learn: {named}" if named else "nothing"
        raise ValueError(f"stage {stage.name!r} trains {what}; the layer groups are {', '.join(sizes)}")
    if stage.steps < 1:
        raise ValueError(f"stage {stage.name!r} has {stage.steps} steps; at least 1 is needed")


def trainable_table(stage: Stage, groups: Sequence[LayerGroup]) -> str:
    """Lines to read: each group's parameters, and its rate or that it is frozen; their sum."""
    total, learning = sum(g.size for g in groups), sum(g.size for g in groups if g.name in stage.rates)
    width = max(len(group.name) for group in groups)
    lines = [f"stage {stage.name}: {learning:,} of {total:,} parameters learn"]
    for group in groups:
        rate = f"rate {stage.rates[group.name]:.3g}" if group.name in stage.rates else "frozen"
        lines.append(f"  {group.name:<{width}}  {group.size:>13,}  {rate}")
    return "\n".join(lines)


def _set_modes(module: nn.Module, frozen: bool, all_off: bool) -> None:
    normalises = isinstance(module, nn.modules.batchnorm._NormBase)
    parameters = list(module.parameters(recurse=not normalises))  # an adapter in it is not its own
    if parameters:
        frozen = not any(p.requires_grad for p in parameters)
    if frozen and (all_off or normalises):
        module.training = False
    for child in module.children():
        _set_modes(child, frozen, all_off)
