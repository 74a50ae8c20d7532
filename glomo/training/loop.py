"""The training loop: what is trained, set-up, one loop, to be read from top to bottom.

**Resume is exact.** A run that dies anywhere (kill -9 included) and is started again from its last checkpoint computes
the same losses to the last bit, given equal versions and numbers of threads. Little has to be remembered for that:
which examples a step reads is a function of (seed, step), and every step starts with all random generators seeded by
(seed, step, rank). A checkpoint holds the step, the weights, their mean and the optimiser, the best validation loss so
far, the stage and its steps, and what a task carries from step to step.

Under `torchrun` each process takes its share of every batch; gradients are summed, weighted by the number of loss
terms, so that N processes compute what one would on the whole batch, to within rounding (but BatchNorm, which takes its
statistics of each one's share). Only the first process writes.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from glomo.data import TokenBatches
from glomo.errors import UserError
from glomo.training import checkpoint
from glomo.training.averaging import AveragedSGD, weights_to_judge
from glomo.training.close import penalties_in
from glomo.training.distributed import World, join
from glomo.training.progress import Progress
from glomo.training.run_folder import RunFolder
from glomo.training.staging import MakeStages, Patterns, Staging
from glomo.training.train_config import TrainConfig, make_optimizer, schedule_of
from glomo.training.weight_average import WeightAverage
from glomo.transfer.stages import Stage


class Batches(Protocol):
    """Which examples a step reads, as a pure function of the step."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    def batch(self, step: int) -> list[int]:
        """Indices, for all processes together; steps are counted from 0."""


class Carried(Protocol):
    """What goes on from step to step besides weights: a row of each tensor belongs to an example of the batch."""

    def state_dict(self) -> dict[str, Tensor]:
        """This process's rows."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse."""


@dataclass
class Task:
    """What is trained: a model, its examples, and how a batch of them becomes a loss."""

    model: nn.Module
    batches: Batches
    """over the training examples, for all processes together (rank 0 of 1): `train` shares each batch out"""
    loss: Callable[[list[int], torch.Generator], tuple[Tensor, int, int]]
    """(indices of examples, generator) -> (mean loss, number of terms in that mean, units read)"""
    validate: Callable[[], dict[str, float]] | None = None
    """figures for the metrics; "valid_loss" among them chooses best/ (lower is better)"""
    meta: dict[str, Any] = field(default_factory=dict)
    """plain JSON for every checkpoint's meta.json: configuration, vocabulary, ..."""
    identity: dict[str, str] = field(default_factory=dict)
    """fingerprints, such as {"text": sha256}, that must be the same when the run is taken up again"""
    title: str = "train"
    groups: Patterns = ()
    """patterns of the layer groups, from the bottom to the top (`glomo.transfer.layer_groups`); none: one group. What
    needs no gradient when the run begins stays as it is"""
    stages: MakeStages | None = None
    """the groups -> stages of config.steps together; None: one, at config.lr as config.decay says"""
    before_step: Callable[[int], float] | None = None
    """called with the step, counted from 1, before its batch is read; gives a factor of the step's rates"""
    carried: Carried | None = None
    """saved and restored with the rest"""
    extras: nn.Module | None = None
    """its buffers too (anchors of penalties, averages of weights); they are equal in all processes. What a penalty
    pulls has no weight decay"""
    noted: dict[str, float] = field(default_factory=dict)
    """figures of a step that its loss puts here; they stand beside "loss" in the step's row of the metrics, of several
    processes those of the first one's share"""
    fill: Callable[[], None] | None = None
    """called when a run begins, and not when it goes on: computes what the extras remember of old data, which need not
    be there later"""


class Interrupted(Exception):
    """Stopped by Ctrl-C or SIGTERM, after a checkpoint. ``exit_code`` is 130 or 143."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def set_up(config: TrainConfig) -> World:
    """Threads, device, processes and the seed that the weights start from; call it before the model is made.

    Raises UserError for a device that is not there and for more threads than four a processor.
    """
    processors = os.cpu_count() or 1
    if config.threads > 4 * processors:
        raise UserError(
            f"train.threads is {config.threads}; this machine has {processors} processor(s), and at most "
            f"{4 * processors} threads are possible here"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    return join(config.device)


def train(task: Task, config: TrainConfig, folder: RunFolder | None, world: World) -> dict[str, Any]:
    """Train to ``config.steps``, going on from the newest whole checkpoint in ``folder``; returns the last metrics row.

    ``folder`` is None in every process but the first. Raises UserError for a loss that is not finite (nothing saved is
    lost), for a full disk, and for checkpoints that do not fit; `Interrupted` after Ctrl-C or SIGTERM.
    """
    if config.batch_tokens and not isinstance(task.batches, TokenBatches):
        raise UserError("train.batch_tokens is for sentence pairs; here train.batch_size says how much is in a batch")
    model = task.model.to(world.device)
    if task.extras:
        task.extras.to(world.device)
        if config.shard and world.size > 1:
            raise UserError("train.shard divides the weights, which the penalties of [close] need whole")
    sharded = config.shard and world.shard(model)
    staging = Staging(model, task.groups, task.stages or _one_stage(config), bool(task.validate and config.eval_every))
    optimizer = make_optimizer(staging.groups, config, penalties_in(task.extras))
    average = None
    if config.average != "none":
        decay = config.average_decay if config.average == "ema" else 1.0
        average = WeightAverage(model, decay, config.average_from)
    start, best, plateau, row = 0, math.inf, {"scale": 1.0, "bad": 0}, {}
    losses: list[float] = []  # of all validations
    seconds_before = 0.0

    # go on where a former call stopped
    found = checkpoint.latest(folder.checkpoints) if folder else None
    where = world.from_first(str(found.folder) if found else None)
    if where is not None:
        found = found or checkpoint.load(Path(str(where)))
        state = _check_resume(found, task, config)
        staging.state.update(state.get("staging", {"done": state["step"]}))
        if not staging.over:
            staging.begin(model, optimizer)
        try:
            world.load(model, found.weights)
            world.load_optimizer(optimizer, state["optimizer"])
            if task.extras:
                task.extras.load_state_dict(state.get("extras", {}))
            if average is not None:
                average.load_state_dict(state.get("average", {}))
            if task.carried:
                task.carried.load_state_dict(
                    {name: t[world.rank :: world.size] for name, t in state["carried"].items()}
                )
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{found.folder} does not fit the model of this run: {reason}") from None
        start, best, plateau, row = state["step"], state["best"], state["plateau"], state["row"]
        losses = state.get("losses", [])
        seconds_before = row["seconds"]
    elif task.fill:
        task.fill()
    if folder:
        folder.drop_rows_after(start)
    saved = start

    def save(step: int) -> None:
        nonlocal saved
        if step > saved:
            weights, moments = world.whole(model.state_dict()), world.whole(optimizer.state_dict())
            state = {"step": step, "optimizer": moments, "best": best, "plateau": plateau, "row": row}
            state |= {"staging": staging.state, "losses": losses}
            state |= {"carried": world.rows(task.carried.state_dict()) if task.carried else {}}
            state |= {"extras": task.extras.state_dict()} if task.extras else {}
            state |= {"average": average.state_dict()} if average is not None else {}
            state |= {"identity": task.identity, "environment": _environment(world)}
            if folder:
                target = folder.checkpoints / f"step-{step:06}"
                checkpoint.save(target, weights, state, {"step": step, "stage": staging.state["stage"], **task.meta})
                checkpoint.prune(folder.checkpoints, config.keep)
                folder.prune_stages()
        saved = step

    def judge(step: int, valid: Any) -> None:
        """Keep the best weights, of the run and of a stage that goes back to its best; halve the rate of a plateau."""
        nonlocal best
        if valid is not None and staging.judge(valid) and staging.stage.restore:
            weights = world.whole(model.state_dict())
            if folder:
                place = staging.state["stage"]
                checkpoint.save(folder.stage_best(place), weights, None, {"stage": place, **task.meta})
        if valid is not None and valid < best:
            best, plateau["bad"] = valid, 0
            weights = world.whole(model.state_dict())
            if folder:
                checkpoint.save(folder.best, weights, None, {"step": step, "valid_loss": best, **task.meta})
        elif config.decay == "plateau":
            plateau["bad"] += 1
            if plateau["bad"] >= config.patience:
                plateau["scale"], plateau["bad"] = plateau["scale"] / 2, 0

    def next_stage() -> None:
        """Leave the stage, with its best weights where it says so, and begin the next one."""
        if staging.stage.restore and staging.state["best"] < math.inf:
            where = world.from_first(str(folder.stage_best(staging.state["stage"])) if folder else None)
            world.load(model, checkpoint.load(Path(str(where))).weights)
            for means in (optimizer, average):
                if isinstance(means, AveragedSGD | WeightAverage):
                    means.forget()
        staging.next()
        if not staging.over:
            staging.begin(model, optimizer)
            if task.stages:
                progress.note(f"stage {staging.table()}")

    progress = Progress(task.title, start, config.steps, config.progress if world.rank == 0 else 0.0)
    if start:
        progress.note(f"going on after step {start}")
        if state["environment"] != _environment(world):
            progress.note("other versions, threads or processes than before: the last bits may differ")
    if not start:
        staging.begin(model, optimizer)
    if task.stages and not staging.over:
        progress.note(f"stage {staging.table()}")
    generator = torch.Generator()
    begun = time.monotonic()
    try:
        with stop_signals() as stopped_by:
            for step in range(start + 1, config.steps + 1):
                if not staging.over and staging.ended:
                    next_stage()
                if staging.over or plateau["scale"] < 0.01:
                    break
                seed_step(config.seed, step, world.rank, generator)
                scale = task.before_step(step) if task.before_step else 1.0
                staging.set(model, optimizer, scale * plateau["scale"])

                # forward and backward on this process's share
                batch = task.batches.batch(step - 1)
                share = batch[world.rank :: world.size]
                counts = bool(share)
                if sharded and not counts:
                    share = batch[:1]  # the others need this process's part of the model, with a batch of no weight
                loss, terms, units = torch.zeros((), device=world.device), 0, 0
                task.noted.clear()
                if share:
                    with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                        loss, terms, units = task.loss(share, generator)
                terms, units = (terms, units) if counts else (0, 0)
                value = float(loss.detach())
                signalled = float(stopped_by[0] if stopped_by else 0)
                total, all_terms, all_units, signalled = world.sum([value * terms, terms, units, signalled])
                mean = value if world.size == 1 else total / max(all_terms, 1)
                if not math.isfinite(mean):
                    raise UserError(_not_finite("loss", mean, step, saved))
                optimizer.zero_grad(set_to_none=True)
                if share:
                    weight = terms / max(all_terms, 1) * (world.size if sharded else 1)  # FSDP takes the mean of all
                    (loss if world.size == 1 else loss * weight).backward()
                if not sharded:
                    world.sum_gradients(model.parameters())
                norm = float(world.whole(nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)))
                if not math.isfinite(norm):
                    raise UserError(_not_finite("gradient", norm, step, saved))
                optimizer.step()
                world.mean_statistics(model)
                if average is not None:
                    average.update(step)
                judged = staging.judges_last
                staging.state["done"] += 1

                # report, validate, save
                rate = max(group["lr"] for group in optimizer.param_groups)
                row = {"step": step, "loss": mean, **task.noted, "lr": rate, "grad_norm": norm}
                row |= {"stage": staging.stage.name} if task.stages else {}
                row |= {"units": int(all_units), "seconds": round(seconds_before + time.monotonic() - begun, 3)}
                last = step == config.steps
                due = bool(config.eval_every) and step % config.eval_every == 0
                if task.validate and (last or judged or due):
                    with weights_to_judge(optimizer, average):
                        figures = task.validate()
                        row |= figures
                        valid: Any = world.from_first(figures.get("valid_loss"))
                        judge(step, valid)
                    progress.note(f"step {step}: " + ", ".join(f"{name} {figures[name]:.4g}" for name in figures))
                    if isinstance(optimizer, AveragedSGD) and valid is not None:
                        if len(losses) > config.nonmono and valid > min(losses[: -config.nonmono]):
                            optimizer.start_averaging()
                        losses.append(valid)
                if folder:
                    folder.log(row)
                progress.update(step, mean, int(all_units))
                if last or signalled or (config.checkpoint_every and step % config.checkpoint_every == 0):
                    save(step)
                if signalled:
                    # several processes may have been told: the sum of equal numbers still tells which signal it was
                    code = 128 + (stopped_by[0] if stopped_by else signal.SIGTERM)
                    raise Interrupted(
                        f"stopped after step {step}, which is saved; the same command goes on from there", code
                    )
            save(row["step"])
            if not staging.over and staging.ended:
                next_stage()
    finally:
        progress.close()
    with weights_to_judge(optimizer, average):
        weights = world.whole(model.state_dict())
        if folder and not (start == row["step"] and _holds(folder.final, start)):
            checkpoint.save(folder.final, weights, None, {"step": row["step"], **task.meta})
    return row


def _one_stage(config: TrainConfig) -> MakeStages:
    return lambda groups: [
        Stage("train", config.steps, {group.name: config.lr for group in groups}, schedule_of(config))
    ]


def seed_step(seed: int, step: int, rank: int, generator: torch.Generator) -> None:
    """Seed every random generator as a function of (seed, step, rank): no generator's state has to be saved."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    generator.manual_seed(int.from_bytes(digest[8:16], "little") >> 1)
    random.seed(digest[16:24])
    np.random.seed(int.from_bytes(digest[24:28], "little"))


def _environment(world: World) -> dict[str, str]:
    """What the last bits of a result depend on besides the seed."""
    return {
        "torch": str(torch.__version__),  # a plain string: its own class would not be read back
        "threads": str(torch.get_num_threads()),
        "processes": str(world.size),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
    }


def _check_resume(found: checkpoint.Checkpoint, task: Task, config: TrainConfig) -> Mapping[str, Any]:
    if found.state is None:
        raise UserError(f"{found.folder} has no {checkpoint.STATE}; a run cannot go on from it")
    state = found.state
    if state["step"] > config.steps:
        raise UserError(
            f"{found.folder.parent.parent} is at step {state['step']} already, past train.steps = {config.steps}"
        )
    for name, now in task.identity.items():
        before = state["identity"].get(name)
        if before != now:
            raise UserError(
                f"{found.folder} was made with another {name}: its fingerprint was {str(before)[:12]} and is "
                f"{now[:12]} now; choose another --out"
            )
    return state


def _holds(folder: Path, step: int) -> bool:
    """Whether a checkpoint folder is whole and of this step."""
    try:
        return checkpoint.load(folder).meta.get("step") == step
    except UserError:
        return False


def _not_finite(what: str, value: float, step: int, saved: int) -> str:
    kept = f"the checkpoint of step {saved} is whole" if saved else "no checkpoint was due before"
    return f"the {what} is {value} at step {step}; {kept}; a lower train.lr or train.clip, or train.warmup, may help"


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM in the list given, so that the loop ends its step; a second Ctrl-C breaks at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield seen  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
