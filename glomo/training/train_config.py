"""The [train] section of a recipe, and what it asks for: a schedule and an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from glomo.errors import UserError
from glomo.training.averaging import AveragedSGD
from glomo.training.config import check_range
from glomo.transfer import schedules
from glomo.transfer.closeness import without_decay
from glomo.transfer.closeness.anchors import AnchoredPenalty
from glomo.transfer.groups import LayerGroup
from glomo.transfer.rates import optimizer_groups
from glomo.transfer.schedules import Factor


@dataclass(frozen=True)
class TrainConfig:
    """The [train] section of a recipe. Raises UserError for values out of range."""

    steps: int = 1000
    """optimiser steps in all"""
    batch_size: int = 32
    """sequences in a step, over all processes"""
    batch_tokens: int = 0
    """of `glomo translate`: units in a step, padding included, in place of batch_size; 0: batch_size counts"""
    optimizer: Literal["adamw", "sgd", "nt-asgd"] = "adamw"
    """adamw, sgd, or nt-asgd: sgd whose weights are averaged from the moment when validation stops getting better"""
    nonmono: int = 5
    """of nt-asgd: averaging begins when a validation is worse than the best of those before the last so many"""
    lr: float = 1e-3
    """learning rate at its highest"""
    momentum: float = 0.0
    """of sgd and nt-asgd"""
    beta1: float = 0.9
    """of adamw: how much of the mean gradient is kept"""
    beta2: float = 0.999
    """of adamw: how much of the mean square is kept"""
    adam_eps: float = 1e-8
    """of adamw, added to the root of the squares"""
    weight_decay: float = 0.0
    """on matrices only; of adamw apart from the gradient"""
    average: Literal["none", "ema", "swa"] = "none"
    """none; ema: what is validated and kept is an exponential mean of the weights over the steps; swa: their plain
    mean. A copy of the model is held for it"""
    average_decay: float = 0.999
    """of ema: share of the old mean in the new one, at each step; less in the first steps"""
    average_from: int = 0
    """of ema and swa: the mean is of the weights behind this step"""
    clip: float = 1.0
    """largest norm of the whole gradient; 0: no limit"""
    warmup: int = 0
    """steps in which the rate rises linearly from 0"""
    decay: Literal["constant", "linear", "cosine", "inverse-sqrt", "plateau", "slanted-triangular"] = "constant"
    """linear and cosine reach 0 at the last step; inverse-sqrt is lr * sqrt(warmup / step), which with lr = (dim *
    warmup)^-0.5 is the Transformer's; plateau halves after `patience` validations without gain; slanted-triangular has
    cut_frac and ratio in place of warmup"""
    patience: int = 3
    """of plateau, which also stops the run when the rate falls below 1 % of its start"""
    cut_frac: float = 0.1
    """of slanted-triangular: the share of the steps in which the rate rises"""
    ratio: float = 32.0
    """of slanted-triangular: the highest rate over the lowest"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the matrix products"""
    eval_every: int = 200
    """steps between validations; 0: only after the last step"""
    checkpoint_every: int = 200
    """steps between checkpoints; 0: only after the last step"""
    keep: int = 2
    """how many of the newest checkpoints stay (best/ and final/ stay as well)"""
    seed: int = 0
    """of everything random"""
    threads: int = 0
    """CPU threads; 0: as PyTorch chooses. Results are equal to the bit for equal numbers only"""
    device: str = "auto"
    """auto, cpu, cuda"""
    shard: bool = False
    """several processes divide parameters, gradients and moments among them (FSDP2) in place of a copy each"""
    progress: float = 10.0
    """seconds between lines of progress where there is no terminal; 0: silent"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "keep", "patience", "nonmono", "ratio"):
            check_range(f"train.{name}", getattr(self, name), 1)
        for name in (
            "batch_tokens",
            "adam_eps",
            "average_from",
            "lr",
            "weight_decay",
            "clip",
            "warmup",
            "eval_every",
            "checkpoint_every",
            "threads",
            "progress",
        ):
            check_range(f"train.{name}", getattr(self, name), 0)
        for name in ("momentum", "average_decay"):
            check_range(f"train.{name}", getattr(self, name), 0, 1)
        self._check_average()
        check_range("train.cut_frac", self.cut_frac, 1e-9, 1 - 1e-9)
        for name in ("beta1", "beta2"):
            check_range(f"train.{name}", getattr(self, name), 0, 1 - 1e-9)
        check_range("train.seed", self.seed, 0, 2**63 - 1)

    def _check_average(self) -> None:
        if self.average == "none":
            return
        if self.optimizer == "nt-asgd":
            raise UserError(f"train.average is {self.average!r}, and nt-asgd has means of its own; give one of them")
        if self.shard:
            raise UserError(
                f"train.average is {self.average!r}, which needs the whole weights that train.shard divides; give one "
                "of them"
            )
        if self.average_from >= self.steps:
            raise UserError(
                f"train.average_from is {self.average_from}; it must be below train.steps, which is {self.steps}"
            )


def schedule_of(config: TrainConfig) -> Factor:
    """(step, steps) -> factor of the highest rate."""
    if config.decay == "slanted-triangular":
        return functools.partial(schedules.slanted_triangular, cut_frac=config.cut_frac, ratio=config.ratio)
    if config.decay == "linear":
        return functools.partial(schedules.linear, warmup_steps=config.warmup)
    if config.decay == "cosine":
        return functools.partial(schedules.cosine, warmup_steps=config.warmup)
    if config.decay == "inverse-sqrt":
        return functools.partial(schedules.inverse_sqrt, warmup_steps=config.warmup)
    return functools.partial(schedules.constant, warmup_steps=config.warmup)


def make_optimizer(
    groups: Sequence[LayerGroup], config: TrainConfig, penalties: Sequence[AnchoredPenalty] = ()
) -> torch.optim.Optimizer:
    """AdamW or SGD, with weight decay on matrices only and on nothing that is anchored, whose parameter groups have the
    layer groups' names."""
    made = without_decay(optimizer_groups(groups, config.lr, config.weight_decay), *penalties)
    if config.optimizer == "sgd":
        return torch.optim.SGD(made, lr=config.lr, momentum=config.momentum)
    if config.optimizer == "nt-asgd":
        return AveragedSGD(made, lr=config.lr, momentum=config.momentum)
    # fused: one pass over the weights; on a CPU 8 ms instead of 30 for 2.5 million of them
    return torch.optim.AdamW(made, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
