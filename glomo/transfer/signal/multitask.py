"""One trunk for several tasks: heads above it, and where the inputs differ, encoders of their own below it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class SharedBottom(nn.Module):
    """One trunk, and a head for each task on its features:

    .. code-block:: text

        y_task = head_task(trunk(inputs))

    A step on one task gives the other tasks' heads no gradient (`grad` is None where `zero_grad` sets it to None, as
    it does by default), so that no optimizer moves them, whatever its momentum or weight decay.

    Args:
        trunk: any module; its output is the heads' one input.
        heads: {task: module}.

    Raises:
        ValueError: there is no task, or a name that `nn.ModuleDict` cannot have (one with a dot, or empty).

    Source: Caruana, Machine Learning 28, 1997 (hard sharing); Liu et al., ACL 2019 (MT-DNN).
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = modules_by_task(heads)

    def forward(self, task: str, *inputs: Any) -> Any:
        """The output of the task's head. Raises ValueError for an unknown task."""
        head = _of(self.heads, task)
        return head(self.trunk(*inputs))

    def only(self, task: str) -> nn.Module:
        """The plain module of one task, `forward(*inputs)`, with the same weights (no copy), to go on with it alone.
        Its parts are called `trunk` and `head`."""
        return _Chain(OrderedDict(trunk=self.trunk, head=_of(self.heads, task)))


class SharedMiddle(nn.Module):
    """An input part and a head for each task around one trunk, such as for several languages or vocabularies:

    .. code-block:: text

        y_task = head_task(trunk(input_task(inputs)))

    As with `SharedBottom`, a step on one task leaves the other tasks' parts as they are.

    Args:
        inputs: {task: module}; its output is the trunk's one input.
        trunk: any module; its output is the heads' one input.
        heads: {task: module}, of the same tasks.

    Raises:
        ValueError: inputs and heads are not of the same tasks; there is no task, or a name that `nn.ModuleDict`
            cannot have.

    Source: Huang et al., ICASSP 2013 (shared hidden layers across languages).
    """

    def __init__(self, inputs: Mapping[str, nn.Module], trunk: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if set(inputs) != set(heads):
            raise ValueError(
                f"inputs are of the tasks {', '.join(sorted(inputs)) or 'none'}, and heads of "
                f"{', '.join(sorted(heads)) or 'none'}; each task needs both"
            )
        self.inputs = modules_by_task(inputs)
        self.trunk = trunk
        self.heads = modules_by_task(heads)

    def forward(self, task: str, *inputs: Any) -> Any:
        """The output of the task's head. Raises ValueError for an unknown task."""
        head = _of(self.heads, task)
        return head(self.trunk(self.inputs[task](*inputs)))

    def only(self, task: str) -> nn.Module:
        """The plain module of one task, `forward(*inputs)`, with the same weights (no copy), to go on with it alone.
        Its parts are called `input`, `trunk` and `head`."""
        head = _of(self.heads, task)
        return _Chain(OrderedDict(input=self.inputs[task], trunk=self.trunk, head=head))


def weighted_loss(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The loss of one task, or of several in one step, weighted by task:

    .. code-block:: text

        L = sum_task w_task L_task

    With steps of one task each, drawn with shares p (`TaskSampler`), a task counts p_task w_task in the long run.

    Args:
        losses: {task: scalar}, of the tasks of this step.
        weights: {task: number from 0 on}, of all tasks.

    Raises:
        ValueError: there is no loss, or one without a weight; a weight is negative or no number.
    """
    if not losses:
        raise ValueError("there is no task's loss; at least one is needed")
    for task in losses:
        if task not in weights:
            raise ValueError(f"task {task!r} has a loss and no weight; there are weights of {', '.join(weights)}")
        if not 0 <= weights[task] < float("inf"):
            raise ValueError(f"the weight of task {task!r} is {weights[task]}; a number from 0 on is needed")
    return torch.stack([weights[task] * loss for task, loss in losses.items()]).sum()


class _Chain(nn.Sequential):
    """nn.Sequential whose first module takes any inputs."""

    def forward(self, *inputs: Any) -> Any:
        first, *others = self
        x = first(*inputs)
        for module in others:
            x = module(x)
        return x


def modules_by_task(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """{task: module} as a module. Raises ValueError as `SharedBottom`."""
    if not modules:
        raise ValueError("there is no task; at least one is needed")
    named = nn.ModuleDict()
    for task, module in modules.items():
        try:
            named[task] = module
        except KeyError as error:
            raise ValueError(f"{task!r} cannot be a task's name: {error.args[0]}; another one is needed") from None
    return named


def _of(modules: nn.ModuleDict, task: str) -> nn.Module:
    if task not in modules:
        raise ValueError(f"task {task!r} is unknown; there are {', '.join(modules)}")
    return modules[task]
