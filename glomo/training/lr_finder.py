"""Learning-rate range test: the loss while the rate rises from step to step."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch

from glomo.training.distributed import World
from glomo.training.loop import Task, seed_step
from glomo.training.staging import Staging
from glomo.training.train_config import TrainConfig, make_optimizer
from glomo.transfer.stages import Stage

SMOOTHING = 0.98


def find_rate(
    task: Task, config: TrainConfig, world: World, lowest: float = 1e-7, highest: float = 10.0, steps: int = 100
) -> dict[str, Any]:
    """Train for `steps` at a rate that grows from `lowest` to `highest`, and leave the model as it was:

    .. code-block:: text

        lr_t = lowest (highest / lowest)^(t / (steps - 1)),   smooth_t = mean of the losses, older ones 0.98 as heavy

    It stops early once the smooth loss is four times its least. Layer groups keep the proportions of the stage that
    trains most; the rates are those of the last group.

    Returns:
        {"rates", "losses", "smooth", "suggestion"}: the suggestion is the rate of the steepest descent of the smooth
        loss, over a window of a tenth of the steps; None if it never falls.

    Source: Smith, WACV 2017, section 3.3.
    """
    weights = copy.deepcopy(task.model.state_dict())
    staging = Staging(task.model, task.groups, task.stages or _one, validates=True)
    stage = max(staging.stages, key=lambda one: len(one.rates))
    top = max(stage.rates.values()) or 1.0
    share = {name: rate / top for name, rate in stage.rates.items()}
    task.model.to(world.device)
    optimizer = make_optimizer(staging.groups, config)
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
    return {"rates": rates, "losses": losses, "smooth": smooth, "suggestion": _steepest(rates, smooth, steps // 10)}


def _steepest(rates: Sequence[float], smooth: Sequence[float], window: int) -> float | None:
    """The middle of the window in which the loss falls most, in proportion."""
    window = max(1, min(window, len(smooth) - 1))
    falls = [smooth[i] - smooth[i + window] for i in range(len(smooth) - window)]
    if not falls or max(falls) <= 0:
        return None
    return rates[falls.index(max(falls)) + window // 2]


def _one(groups: Any) -> list[Stage]:
    return [Stage("all", 1, {group.name: 1.0 for group in groups})]
