"""The stages of a run: which one a step belongs to, when it ends, and what of that a checkpoint has to hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from glomo.errors import UserError
from glomo.transfer.groups import LayerGroup, layer_groups
from glomo.transfer.stages import Stage, check_stage, trainable_table

Patterns = Sequence[str] | Mapping[str, str]
MakeStages = Callable[[Sequence[LayerGroup]], Iterable[Stage]]


class Staging:
    """Walks through the stages, one step at a time. `state` says where it is, in plain values."""

    def __init__(self, model: nn.Module, patterns: Patterns, make: MakeStages, validates: bool) -> None:
        """Raises UserError for patterns that miss or double a parameter, and for a stage that cannot be run."""
        try:
            groups = layer_groups(model, patterns) if patterns else [LayerGroup("all", dict(model.named_parameters()))]
            # what needs no gradient now (a table of fixed vectors) never will
            self.groups = [
                LayerGroup(group.name, {name: p for name, p in group.parameters.items() if p.requires_grad})
                for group in groups
            ]
            self.stages = list(make(self.groups))
            for stage in self.stages:
                check_stage(stage, self.groups)
        except ValueError as error:
            raise UserError(str(error)) from None
        for stage in self.stages:
            if (stage.patience or stage.restore) and not validates:
                raise UserError(
                    f"stage {stage.name!r} goes by validations, and there are none: a validation set and "
                    "train.eval_every are needed"
                )
        self.state: dict[str, Any] = {"stage": 0, "done": 0, "best": math.inf, "bad": 0}

    @property
    def stage(self) -> Stage:
        return self.stages[self.state["stage"]]

    @property
    def over(self) -> bool:
        """Whether all stages are behind."""
        return self.state["stage"] >= len(self.stages)

    @property
    def ended(self) -> bool:
        """Whether the stage has had its steps, or its patience is at an end."""
        done, patience = self.state["done"], self.stage.patience
        return done >= self.stage.steps or bool(patience and self.state["bad"] >= patience)

    @property
    def judges_last(self) -> bool:
        """Whether the coming step is the last of a stage that goes by validations, and so has one."""
        return self.state["done"] + 1 >= self.stage.steps and bool(self.stage.patience or self.stage.restore)

    def next(self) -> None:
        """Go to the next stage."""
        self.state.update(stage=self.state["stage"] + 1, done=0, best=math.inf, bad=0)

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Freeze and unfreeze for the stage."""
        self.stage.begin(model, self.groups, optimizer)

    def set(self, model: nn.Module, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """Modes and rates of the coming step."""
        self.stage.set_modes(model)
        self.stage.set_rates(optimizer, self.state["done"], scale)

    def judge(self, valid: float) -> bool:
        """Take note of a validation loss; whether it is the best of the stage."""
        better = valid < self.state["best"]
        self.state.update({"best": valid, "bad": 0} if better else {"bad": self.state["bad"] + 1})
        return better

    def table(self) -> str:
        """What learns in this stage, to read."""
        return f"{self.state['stage'] + 1} of {len(self.stages)}, {trainable_table(self.stage, self.groups)}"
