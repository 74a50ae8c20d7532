"""The training loop: settings, set-up, one loop, to be read from top to bottom.

**Resume is exact.** A run that dies anywhere (kill -9 included) and is started again from its last checkpoint computes
the same losses to the last bit, given equal versions and numbers of threads. Little has to be remembered for that:
which examples a step reads is a function of (seed, step), and every step starts with all random generators seeded by
(seed, step, rank). A checkpoint holds the step, the weights, the optimiser and the best validation loss so far.

Under `torchrun` each process takes its share of every batch; gradients are summed, weighted by the number of loss
terms, so that N processes compute what one would on the whole batch, to within rounding. Only the first process writes.
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
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from glomo.data import BucketBatches, TokenBatches
from glomo.errors import UserError
from glomo.training import checkpoint
from glomo.training.config import check_range
from glomo.training.distributed import World, join
from glomo.training.progress import Progress
from glomo.training.run_folder import RunFolder


@dataclass(frozen=True)
class TrainConfig:
    """The [train] section of a recipe. Raises UserError for values out of range."""

    steps: int = 1000
    """optimiser steps in all"""
    batch_size: int = 32
    """sequences in a step, over all processes"""
    batch_tokens: int = 0
    """of `glomo translate`: units in a step, padding included, in place of batch_size; 0: batch_size counts"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw or sgd"""
    lr: float = 1e-3
    """learning rate at its highest"""
    momentum: float = 0.0
    """of sgd"""
    beta1: float = 0.9
    """of adamw: how much of the mean gradient is kept"""
    beta2: float = 0.999
    """of adamw: how much of the mean square is kept"""
    adam_eps: float = 1e-8
    """of adamw, added to the root of the squares"""
    weight_decay: float = 0.0
    """of adamw, on matrices only"""
    clip: float = 1.0
    """largest norm of the whole gradient; 0: no limit"""
    warmup: int = 0
    """steps in which the rate rises linearly from 0"""
    decay: Literal["constant", "linear", "cosine", "inverse-sqrt", "plateau"] = "constant"
    """linear and cosine reach 0 at the last step; inverse-sqrt is lr * sqrt(warmup / step), which with lr = (dim *
    warmup)^-0.5 is the Transformer's; plateau halves after `patience` validations without gain"""
    patience: int = 3
    """of plateau, which also stops the run when the rate falls below 1 % of its start"""
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
        for name in ("steps", "batch_size", "keep", "patience"):
            check_range(f"train.{name}", getattr(self, name), 1)
        for name in (
            "batch_tokens",
            "adam_eps",
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
        check_range("train.momentum", self.momentum, 0, 1)
        for name in ("beta1", "beta2"):
            check_range(f"train.{name}", getattr(self, name), 0, 1 - 1e-9)
        check_range("train.seed", self.seed, 0, 2**63 - 1)


@dataclass
class Task:
    """What is trained: a model, its examples, and how a batch of them becomes a loss."""

    model: nn.Module
    batches: BucketBatches | TokenBatches
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
    sharded = config.shard and world.shard(model)
    optimizer = make_optimizer(model, config)
    start, best, plateau, row = 0, math.inf, {"scale": 1.0, "bad": 0}, {}
    seconds_before = 0.0

    # go on where a former call stopped
    found = checkpoint.latest(folder.checkpoints) if folder else None
    where = world.from_first(str(found.folder) if found else None)
    if where is not None:
        found = found or checkpoint.load(Path(str(where)))
        state = _check_resume(found, task, config)
        try:
            world.load(model, found.weights)
            world.load_optimizer(optimizer, state["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{found.folder} does not fit the model of this run: {reason}") from None
        start, best, plateau, row = state["step"], state["best"], state["plateau"], state["row"]
        seconds_before = row["seconds"]
    if folder:
        folder.drop_rows_after(start)
    saved = start

    def save(step: int) -> None:
        nonlocal saved
        if step > saved:
            weights, moments = world.whole(model.state_dict()), world.whole(optimizer.state_dict())
            state = {"step": step, "optimizer": moments, "best": best, "plateau": plateau, "row": row}
            state |= {"identity": task.identity, "environment": _environment(world)}
            if folder:
                target = folder.checkpoints / f"step-{step:06}"
                checkpoint.save(target, weights, state, {"step": step, **task.meta})
                checkpoint.prune(folder.checkpoints, config.keep)
        saved = step

    def judge(step: int, valid: Any) -> None:
        """Keep the best weights; halve the rate of a plateau."""
        nonlocal best
        if valid is not None and valid < best:
            best, plateau["bad"] = valid, 0
            weights = world.whole(model.state_dict())
            if folder:
                checkpoint.save(folder.best, weights, None, {"step": step, "valid_loss": best, **task.meta})
        elif config.decay == "plateau":
            plateau["bad"] += 1
            if plateau["bad"] >= config.patience:
                plateau["scale"], plateau["bad"] = plateau["scale"] / 2, 0

    progress = Progress(task.title, start, config.steps, config.progress if world.rank == 0 else 0.0)
    if start:
        progress.note(f"going on after step {start}")
        if state["environment"] != _environment(world):
            progress.note("other versions, threads or processes than before: the last bits may differ")
    generator = torch.Generator()
    begun = time.monotonic()
    try:
        with _stop_signals() as stopped_by:
            for step in range(start + 1, config.steps + 1):
                if plateau["scale"] < 0.01:
                    break
                _seed(config.seed, step, world.rank, generator)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, config) * plateau["scale"]

                # forward and backward on this process's share
                model.train()
                batch = task.batches.batch(step - 1)
                share = batch[world.rank :: world.size]
                counts = bool(share)
                if sharded and not counts:
                    share = batch[:1]  # the others need this process's part of the model, with a batch of no weight
                loss, terms, units = torch.zeros((), device=world.device), 0, 0
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

                # report, validate, save
                row = {"step": step, "loss": mean, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
                row |= {"units": int(all_units), "seconds": round(seconds_before + time.monotonic() - begun, 3)}
                last = step == config.steps
                if task.validate and (last or (config.eval_every and step % config.eval_every == 0)):
                    figures = task.validate()
                    progress.note(f"step {step}: " + ", ".join(f"{name} {figures[name]:.4g}" for name in figures))
                    row |= figures
                    judge(step, world.from_first(figures.get("valid_loss")))
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
    finally:
        progress.close()
    weights = world.whole(model.state_dict())
    if folder and not (start == row["step"] and _holds(folder.final, start)):
        checkpoint.save(folder.final, weights, None, {"step": row["step"], **task.meta})
    return row


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of ``step`` (counted from 1): linear warm-up to ``lr``, then as ``decay`` says; never negative."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    if config.decay == "linear":
        return config.lr * max(0.0, 1.0 - done)
    if config.decay == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    if config.decay == "inverse-sqrt":
        return config.lr * math.sqrt(max(config.warmup, 1) / step)
    return config.lr


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (weight decay on matrices only) or SGD over the parameters that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=config.lr, momentum=config.momentum)
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    given = [group for group in groups if group["params"]]
    return torch.optim.AdamW(given, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps)


def _seed(seed: int, step: int, rank: int, generator: torch.Generator) -> None:
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
def _stop_signals() -> Iterator[list[int]]:
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
