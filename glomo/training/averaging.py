"""SGD whose weights are averaged over the steps, once that is asked for (ASGD)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from glomo.training.weight_average import WeightAverage


class AveragedSGD(torch.optim.SGD):
    """SGD; from `start_averaging` on it also keeps the mean of every parameter over the steps:

    .. code-block:: text

        w_t = w_{t-1} - lr g_t,    mean = (1 / n) sum of the last n w_t

    Which moment that is, is the loop's to say: NT-ASGD takes the first validation that is worse than the best of
    those before the last `nonmono`. The mean is part of the state.

    Source: Polyak & Juditsky, 1992; Merity, Keskar & Socher, ICLR 2018, algorithm 1.
    """

    @property
    def averaging(self) -> bool:
        return bool(self.param_groups[0].get("averaging", False))

    def start_averaging(self) -> None:
        """From the next step on."""
        for group in self.param_groups:
            group["averaging"] = True

    def forget(self) -> None:
        """Begin the means anew, from weights that were set from outside."""
        for state in self.state.values():
            state.pop("mean", None)
            state.pop("count", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, for which gradients must be there; parameters without one stay, and count in no mean."""
        result = super().step(closure)
        if self.averaging:
            for parameter, state in self._learning():
                count = state.get("count", 0) + 1
                state["count"] = count
                if count == 1:
                    state["mean"] = parameter.clone()
                else:
                    state["mean"].lerp_(parameter, 1 / count)
        return result

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the parameters are their means, where there are means."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].get("mean") if parameter in self.state else None
                if mean is not None:
                    kept = parameter.clone()
                    parameter.copy_(mean)
                    mean.copy_(kept)

    def _learning(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield parameter, self.state[parameter]


@contextmanager
def weights_to_judge(optimizer: torch.optim.Optimizer, average: WeightAverage | None = None) -> Iterator[None]:
    """Within it a model has the weights that are validated and kept: the means of an `AveragedSGD` or a
    `WeightAverage`."""
    means = optimizer if isinstance(optimizer, AveragedSGD) else average
    if means is not None:
        with means.averaged():
            yield
    else:
        yield
