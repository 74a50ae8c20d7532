"""Elastic weight consolidation: weights that an old task depends on stay, others may move."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glomo.nn.precision import at_least_fp32
from glomo.transfer.closeness.anchors import (
    AnchoredPenalty,
    Choice,
    check_factor,
    chosen_parameters,
    tensor_tree,
)


class EWC(AnchoredPenalty):
    """The penalty

    .. code-block:: text

        sum_i strength / 2 F_i (theta_i - theta*_i)^2

    with theta* the weights after the old task, and F the diagonal of its Fisher information there. It is 0 until
    `consolidate` has been called, which is done once the old task is learned:

    >>> ewc = EWC(model, strength=100.0)
    >>> ewc.consolidate(diagonal_fisher(model, old_batches))
    >>> loss = cross_entropy(model(x), y) + ewc()

    For several old tasks either one `EWC` each, whose penalties are added (Kirkpatrick et al.), or one `OnlineEWC`,
    which is to be preferred: the weights after task B already are a compromise with task A, so that a sum of penalties
    around the weights after each task counts A again with every task that follows, and grows with the tasks.
    A single penalty around the last weights follows from Laplace's approximation (Huszar, arXiv 1712.03847).

    Args:
        model: whose parameters are penalised.
        strength: lambda. It depends on the tasks: 10 to 10^4 is the usual range to search.
        on: (name, parameter) -> whether it is penalised; None: all. Leave out a head that will be replaced.

    Raises:
        ValueError: strength is negative; nothing is penalised.

    Source: Kirkpatrick et al., PNAS 2017, equation 3.
    """

    def __init__(self, model: nn.Module, strength: float, on: Choice | None = None) -> None:
        chosen = chosen_parameters(model, on)
        super().__init__(model, chosen)
        self.strength = check_factor("strength", strength)
        self.fisher = tensor_tree({n: torch.zeros_like(p, dtype=at_least_fp32(p.dtype)) for n, p in chosen.items()})

    def consolidate(self, fisher: Mapping[str, Tensor]) -> None:
        """The model's present weights become the anchors, and `fisher` their Fisher information, in place of what was
        there before.

        Args:
            fisher: {name: F}, of `diagonal_fisher`; names that are not penalised are not looked at.

        Raises:
            ValueError: a penalised parameter is missing, has another shape, or a number below 0 or not finite.
        """
        self._consolidate(fisher, 0.0)

    def factors(self) -> dict[str, float]:
        return dict.fromkeys(self.names, self.strength)

    def forward(self) -> Tensor:
        """The penalty, a scalar."""
        squares = [(self.fisher.get_buffer(name) * d.square()).sum() for name, d in self.differences()]
        return self.strength / 2 * sum(squares[1:], squares[0])

    @torch.no_grad()
    def _consolidate(self, fisher: Mapping[str, Tensor], kept: float) -> None:
        parameters = self.penalised()
        for name, parameter in parameters.items():
            if name not in fisher:
                raise ValueError(f"fisher has nothing for the parameter {name!r}; one entry for each is needed")
            if fisher[name].shape != parameter.shape:
                raise ValueError(
                    f"parameter {name!r} is {tuple(parameter.shape)} and its Fisher information "
                    f"{tuple(fisher[name].shape)}; one shape is needed"
                )
            if not bool(((fisher[name] >= 0) & fisher[name].isfinite()).all()):
                raise ValueError(
                    f"the Fisher information of {name!r} has numbers that are negative or not finite; squares of "
                    "gradients are needed"
                )
        for name, parameter in parameters.items():
            total = self.fisher.get_buffer(name)
            total.mul_(kept).add_(fisher[name].to(total))
            self.anchors.get_buffer(name).copy_(parameter)


class OnlineEWC(EWC):
    """EWC with one penalty for all tasks so far, around the weights after the last:

    .. code-block:: text

        F~_t = gamma F~_{t-1} + F_t,     sum_i strength / 2 F~_{t,i} (theta_i - theta*_{t,i})^2

    Call `consolidate` after each task. With gamma below 1 old tasks are forgotten gracefully. (Gamma acts at the next
    `consolidate`; where a formula has it in the penalty itself, strength takes it up.)

    Args:
        model, strength, on: of `EWC`.
        gamma: from 0 (only the last task counts) to 1.

    Raises:
        ValueError: gamma is not from 0 to 1; as for `EWC`.

    Source: Schwarz et al., ICML 2018; Huszar, arXiv 1712.03847.
    """

    def __init__(self, model: nn.Module, strength: float, gamma: float = 1.0, on: Choice | None = None) -> None:
        super().__init__(model, strength, on)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}; a number from 0 to 1 is needed")
        self.gamma = gamma

    def consolidate(self, fisher: Mapping[str, Tensor]) -> None:
        """The model's present weights become the anchors; `fisher` is added to gamma times what was there.

        Raises:
            ValueError: as for `EWC.consolidate`.
        """
        self._consolidate(fisher, self.gamma)
