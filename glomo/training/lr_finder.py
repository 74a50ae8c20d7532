"""Learning-rate range test: the loss while the rate rises from step to step."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from glomo.errors import UserError
from glomo.training.close import penalties_in
from glomo.training.distributed import World
from glomo.training.loop import Task, seed_step
from glomo.training.staging import Staging
from glomo.training.train_config import TrainConfig, make_optimizer
from glomo.transfer.stages import Stage

SMOOTHING = 0.9


def find_rate(
    task: Task, config: TrainConfig, world: World, lowest: float = 1e-7, highest: float = 10.0, steps: int = 100
) -> dict[str, Any]:
    """Train for `steps` at a rate that grows from `lowest` to `highest`, and leave the model as it was:

    .. code-block:: text

        lr_t = lowest (highest / lowest)^(t / (steps - 1)),   smooth_t = mean of the losses, older ones 0.9 as heavy

    It stops early once the smooth loss is four times its least. Layer groups keep the proportions of the stage that
    trains most; the rates are those of the last group.

    Returns:
        {"rates", "losses", "smooth", "suggestion"}: the suggestion is a tenth of the rate at which the smooth loss is
        least; None where it is within the spread of the first losses, at whose rates nothing is learned.

    Raises:
        UserError: there are several processes.

    Source: Smith, WACV 2017, section 3.3.
    """
    if world.size > 1:
        raise UserError("the range test is for one process; run it without torchrun")
    weights = copy.deepcopy(task.model.state_dict())
    learns = {parameter: parameter.requires_grad for parameter in task.model.parameters()}
    training = {module: module.training for module in task.model.modules()}
    staging = Staging(task.model, task.groups, task.stages or _one, validates=True)
    stage = max(staging.stages, key=lambda one: len(one.rates))
    top = max(stage.rates.values()) or 1.0
    share = {name: rate / top for name, rate in stage.rates.items()}
    task.model.to(world.device)
    extras = task.extras.to(world.device) if task.extras else nn.Module()
    if task.fill:
        task.fill()
    kept = copy.deepcopy(extras.state_dict())
    optimizer = make_optimizer(staging.groups, config, penalties_in(task.extras))
    generator = torch.Generator()
    rates, losses, smooth, mean = [], [], [], 0.0
    try:
        for step in range(1, steps + 1):
            rate = lowest * (highest / lowest) ** ((step - 1) / max(1, steps - 1))
            now = Stage("range", steps, {name: rate * part for name, part in share.items()}, frozen=stage.frozen)
            now.begin(task.model, staging.groups, optimizer)
            seed_step(config.seed, step, world.rank, generator)
            if task.before_step:
                task.before_step(step)
            now.set_modes(task.model)
            now.set_rates(optimizer, step - 1)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, _, _ = task.loss(task.batches.batch(step - 1), generator)
            value = float(loss.detach())
            mean = SMOOTHING * mean + (1 - SMOOTHING) * value
            rates.append(rate)
            losses.append(value)
            smooth.append(mean / (1 - SMOOTHING**step))
            if not math.isfinite(value) or smooth[-1] > 4 * min(smooth):
                break
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.model.parameters(), config.clip or math.inf)
            optimizer.step()
    finally:
        task.model.load_state_dict(weights)
        extras.load_state_dict(kept)
        for parameter, value in learns.items():
            parameter.requires_grad_(value).grad = None
        for module, mode in training.items():
            module.training = mode
    return {"rates": rates, "losses": losses, "smooth": smooth, "suggestion": _suggestion(rates, losses, smooth)}


def _suggestion(rates: Sequence[float], losses: Sequence[float], smooth: Sequence[float]) -> float | None:
    first = losses[: max(2, len(losses) // 5)]
    least = min(range(len(smooth)), key=smooth.__getitem__)
    if len(losses) < 3 or smooth[least] > statistics.fmean(first) - statistics.stdev(first):
        return None
    return rates[least] / 10


def _one(groups: Any) -> list[Stage]:
    return [Stage("all", 1, {group.name: 1.0 for group in groups})]
