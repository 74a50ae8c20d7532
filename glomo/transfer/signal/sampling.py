"""Which task a step of multi-task training is for: a pure function of (seed, step), so that a restart needs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class TaskOrder(Protocol):
    """What `task_batches` asks of an order of tasks."""

    @property
    def tasks(self) -> tuple[str, ...]: ...
    def task(self, step: int) -> str: ...
    def occurrence(self, step: int) -> int: ...


class TaskSampler:
    """Tasks in random order, each as often as its share says:

    .. code-block:: text

        p_i = N_i^alpha / sum_j N_j^alpha       N_i: examples of task i

    alpha 1 is proportional, 0.5 the square root, 0 uniform. `annealed_alpha` makes it fall from epoch to epoch.

    Steps are not drawn one by one: of the S steps of every epoch a task gets p_i S, rounded down or up at random so
    that the mean over many epochs is p_i S, and their order is shuffled. So no task is passed over by bad luck.

    Args:
        sizes: {task: its examples}, or pairs of the two.
        epoch_steps: steps in an epoch, S.
        seed: of rounding and shuffling, at least 0.
        alpha: a number from 0 on, or a function from the epoch, counted from 0, to one.

    Raises:
        ValueError: there is no task, two of one name, or one without examples; epoch_steps is below 1; alpha is
            negative or no number.

    Source: Stickland & Murray, ICML 2019 (square root and annealed sampling).
    """

    def __init__(
        self,
        sizes: Mapping[str, int] | Sequence[tuple[str, int]],
        epoch_steps: int,
        seed: int,
        alpha: float | Callable[[int], float] = 0.5,
    ) -> None:
        pairs = list(sizes.items()) if isinstance(sizes, Mapping) else list(sizes)
        self.tasks = _distinct([name for name, _ in pairs])
        empty = next(((name, size) for name, size in pairs if size < 1), None)
        if empty is not None:
            raise ValueError(f"task {empty[0]!r} has {empty[1]} examples; at least 1 is needed, or leave the task out")
        if epoch_steps < 1:
            raise ValueError(f"epoch_steps is {epoch_steps}; at least 1 is needed")
        self.epoch_steps, self.seed, self.alpha = epoch_steps, seed, alpha
        self._log_sizes = [math.log(size) for _, size in pairs]
        self._planned: tuple[int, _Plan] | None = None
        self._before: list[npt.NDArray[np.int64]] = [np.zeros(len(pairs), np.int64)]
        self.shares(0)  # a bad alpha is told here, not at the first step

    def shares(self, epoch: int) -> dict[str, float]:
        """{task: p} in an epoch counted from 0."""
        alpha = self.alpha(epoch) if callable(self.alpha) else self.alpha
        if not 0 <= alpha < math.inf:
            raise ValueError(
                f"alpha is {alpha} in epoch {epoch}; from 0 (uniform) over 0.5 (square root) to 1 (proportional) is "
                "usual, and at least 0 is needed"
            )
        logs = [alpha * log_size for log_size in self._log_sizes]
        powers = [math.exp(log - max(logs)) for log in logs]
        return {task: power / math.fsum(powers) for task, power in zip(self.tasks, powers, strict=True)}

    def task(self, step: int) -> str:
        """The task of a step, counted from 0 over all epochs."""
        plan, place = self._plan(step)
        return self.tasks[plan.order[place]]

    def occurrence(self, step: int) -> int:
        """How many steps before this one were of its task: the number of the task's batch to take."""
        plan, place = self._plan(step)
        task, epoch = plan.order[place], step // self.epoch_steps
        while len(self._before) <= epoch:
            self._before.append(self._before[-1] + self._counts(len(self._before) - 1)[0])
        return int(self._before[epoch][task] + plan.ranks[place])

    def _counts(self, epoch: int) -> tuple[npt.NDArray[np.int64], np.random.Generator]:
        random = np.random.default_rng([self.seed, epoch])
        # systematic sampling: one random number shifts all the bounds, so that the counts always sum to the steps
        ends = np.cumsum(list(self.shares(epoch).values()))[:-1] * self.epoch_steps
        bounds = np.floor(ends + random.random()).astype(np.int64).clip(0, self.epoch_steps)
        return np.diff(bounds, prepend=0, append=self.epoch_steps), random

    def _plan(self, step: int) -> tuple[_Plan, int]:
        if step < 0:
            raise ValueError(f"step is {step}; steps are counted from 0")
        epoch, place = divmod(step, self.epoch_steps)
        if self._planned is None or self._planned[0] != epoch:
            counts, random = self._counts(epoch)
            self._planned = epoch, _Plan(random.permutation(np.repeat(np.arange(len(counts)), counts)))
        return self._planned[1], place


class _Plan:
    """The tasks of an epoch's steps, and how many steps of the same task came before each in the epoch."""

    def __init__(self, order: npt.NDArray[np.int64]) -> None:
        self.order, self.ranks = order, np.empty_like(order)
        for task in np.unique(order):
            places = np.flatnonzero(order == task)
            self.ranks[places] = np.arange(len(places))


class RoundRobin:
    """One task after the other, in the order of their names as given.

    Raises:
        ValueError: there is no task, or two have one name.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = _distinct(list(tasks))

    def task(self, step: int) -> str:
        """The task of a step counted from 0."""
        return self.tasks[step % len(self.tasks)]

    def occurrence(self, step: int) -> int:
        """How many steps before this one were of its task."""
        return step // len(self.tasks)


def annealed_alpha(epoch: int, epochs: int) -> float:
    """The exponent of an epoch counted from 0; it falls from 1 (proportional) to 0.2 (nearly uniform):

    .. code-block:: text

        alpha = 1 - 0.8 e / (E - 1)         1 - 0.8 (e - 1) / (E - 1) with e counted from 1

    It stays at 0.2 after the last epoch, and is 1 if there is only one.

    Raises:
        ValueError: epochs is below 1, or epoch below 0.

    Source: Stickland & Murray, ICML 2019.
    """
    if epochs < 1 or epoch < 0:
        raise ValueError(f"epoch is {epoch} of {epochs}; epochs are counted from 0, and at least 1 is needed")
    return 1 - 0.8 * min(epoch, epochs - 1) / max(1, epochs - 1)


def task_batches(
    order: TaskOrder, batches: Mapping[str, Callable[[int], Any]], steps: int, first: int = 0
) -> Iterator[tuple[int, str, Any]]:
    """The steps from `first` to `steps` - 1 as (step, task, batch). A run that was stopped goes on with its step as
    `first`: every task takes up its batches where they were.

    Args:
        order: a `TaskSampler` or `RoundRobin`.
        batches: {task: function from a number n, counted from 0, to the task's n-th batch}, such as the `batch` of a
            `glomo.data.BucketBatches`, which shuffles anew after every pass over the task's examples.

    Raises:
        ValueError: the tasks of order and batches are not the same.
    """
    if set(order.tasks) != set(batches):
        raise ValueError(f"the order has the tasks {_names(order.tasks)}, and there are batches of {_names(batches)}")
    for step in range(first, steps):
        task = order.task(step)
        yield step, task, batches[task](order.occurrence(step))


def _distinct(names: list[str]) -> tuple[str, ...]:
    if not names:
        raise ValueError("there is no task; at least one is needed")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two tasks are called {twice!r}; each needs a name of its own")
    return tuple(names)


def _names(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "none"
