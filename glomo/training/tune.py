"""The [tune] section of a recipe: what a run starts from, and what it trains when."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from glomo.errors import UserError
from glomo.training.config import check_range
from glomo.training.staging import MakeStages
from glomo.training.train_config import TrainConfig, schedule_of
from glomo.transfer import (
    chain_thaw,
    feature_extraction,
    freeze_all_but_top,
    full,
    gradual_unfreezing,
    sequential_unfreezing,
    slanted_triangular,
)
from glomo.transfer.groups import LayerGroup
from glomo.transfer.rates import FACTOR
from glomo.transfer.stages import Stage

METHODS = ("full", "top", "features", "gradual-unfreeze", "chain-thaw", "sequential")
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"method": "gradual-unfreeze", "factor": FACTOR},
    "scripts": {"method": "gradual-unfreeze", "factor": FACTOR, "depth": 2, "restart": True, "last_cut_frac": 0.125},
}


@dataclass(frozen=True)
class Tune:
    """The [tune] section. Raises UserError for values out of range."""

    init: str = ""
    """run or checkpoint folder of the language model to start from; empty: from random weights"""
    method: Literal["full", "top", "features", "gradual-unfreeze", "chain-thaw", "sequential"] = "full"
    """which layer groups learn when; chain-thaw and sequential have constant rates, as published, whatever train.decay
    is"""
    factor: float = 1.0
    """a group's rate over that of the one below it; of full and gradual-unfreeze"""
    rates: tuple[float, ...] = ()
    """rates of the groups as multiples of train.lr, from the bottom, in place of factor"""
    top: int = 1
    """how many groups learn, counted from the last; of top and features"""
    stage_steps: int = 0
    """steps of a stage of gradual-unfreeze, and of an epoch of sequential; 0: one epoch"""
    depth: int = -1
    """stages of gradual-unfreeze before the one that trains all; -1: one for each group but the first"""
    restart: bool = False
    """the schedule of train.decay begins anew in every stage of gradual-unfreeze"""
    last_cut_frac: float = 0.0
    """train.cut_frac of the last stage, with restart; 0: the same"""
    lower_lr: float = 1e-4
    """the rate of all stages but the first of chain-thaw, and of all groups but the last of sequential"""
    patience: int = 5
    """validations without gain after which a stage of chain-thaw ends at its best weights; 0: none ends early"""
    n: int = 2
    """of sequential: the epoch from which all groups but the first learn"""
    k: int = 5
    """of sequential: the epoch from which all groups learn"""
    layers: int = -1
    """how many layers of tune.init are taken over, from the embeddings (0: those alone) upwards; the others start from
    random weights; -1: all"""

    def __post_init__(self) -> None:
        check_range("tune.factor", self.factor, 1e-3, 1e3)
        for rate in self.rates:
            check_range("tune.rates", rate, 0)
        if self.layers >= 0 and not self.init:
            raise UserError(f"tune.layers is {self.layers}, and tune.init, whose layers are meant, is empty")
        if self.rates and self.method not in ("full", "gradual-unfreeze"):
            raise UserError(f"tune.rates goes with the methods full and gradual-unfreeze, not with {self.method}")
        if self.rates and not any(self.rates):
            raise UserError("tune.rates are all 0: nothing would learn")
        if self.last_cut_frac and not self.restart:
            raise UserError("tune.last_cut_frac is of a schedule that begins anew, which tune.restart says")
        for name in ("top", "n", "k"):
            check_range(f"tune.{name}", getattr(self, name), 1)
        for name in ("stage_steps", "lower_lr", "patience"):
            check_range(f"tune.{name}", getattr(self, name), 0)
        for name in ("depth", "layers"):
            check_range(f"tune.{name}", getattr(self, name), -1)
        check_range("tune.last_cut_frac", self.last_cut_frac, 0, 1 - 1e-9)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Tune:
        """`paper` and `scripts`: ULMFiT's classifier as Howard & Ruder (2018) describe it, and as their scripts do it:
        the last group, the last two, then all, each with a schedule of its own."""
        if name not in _PRESETS:
            raise UserError(f"there is no preset {name!r}; there are {', '.join(_PRESETS)}.")
        return cls(**{**_PRESETS[name], **overrides})

    @property
    def plain(self) -> bool:
        """Whether everything learns at one rate, all the time."""
        return self.method == "full" and self.factor == 1.0 and not self.rates


def make_stages(tune: Tune, train: TrainConfig, epoch_steps: int) -> MakeStages:
    """The groups -> stages of train.steps together. Mistakes raise ValueError when the stages are made."""

    def stages(groups: Sequence[LayerGroup]) -> Iterable[Stage]:
        schedule, steps = schedule_of(train), tune.stage_steps or epoch_steps
        if tune.method == "chain-thaw":
            return chain_thaw(groups, train.steps, train.lr, tune.lower_lr, tune.patience)
        if tune.method == "sequential":
            return sequential_unfreezing(groups, train.steps, steps, train.lr, tune.lower_lr, tune.n, tune.k)
        if tune.method == "top":
            return freeze_all_but_top(groups, train.steps, train.lr, tune.top, schedule)
        if tune.method == "features":
            return feature_extraction(groups, train.steps, train.lr, tune.top, schedule)
        if tune.method == "gradual-unfreeze":
            last = schedule
            if tune.last_cut_frac and train.decay == "slanted-triangular":
                last = functools.partial(slanted_triangular, cut_frac=tune.last_cut_frac, ratio=train.ratio)
            depth = None if tune.depth < 0 else tune.depth
            found: Iterable[Stage] = gradual_unfreezing(
                groups, train.steps, steps, train.lr, tune.factor, depth, schedule, last, tune.restart
            )
        else:
            found = full(groups, train.steps, train.lr, tune.factor, schedule)
        return [_with_rates(stage, groups, tune, train.lr) for stage in found]

    return stages


def _with_rates(stage: Stage, groups: Sequence[LayerGroup], tune: Tune, lr: float) -> Stage:
    """The stage at the rates that `tune.rates` says."""
    if not tune.rates:
        return stage
    if len(tune.rates) != len(groups):
        names = ", ".join(group.name for group in groups)
        raise ValueError(f"tune.rates has {len(tune.rates)} rates; there are {len(groups)} layer groups: {names}")
    given = {group.name: rate * lr for group, rate in zip(groups, tune.rates, strict=True)}
    return dataclasses.replace(stage, rates={name: given[name] for name in stage.rates})
