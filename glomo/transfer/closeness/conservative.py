"""Conservative training: with few target data, stay close to the source model, in its parameters or in its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn.precision import at_least_fp32
from glomo.transfer.closeness.anchors import AnchoredPenalty, check_factor, chosen_parameters
from glomo.transfer.closeness.distances import Distance, output_distance
from glomo.transfer.closeness.source_model import SourceModel
from glomo.transfer.groups import LayerGroup


class ConservativeParameters(AnchoredPenalty):
    """The penalty

    .. code-block:: text

        strength ||w - w_0||^2

    on all parameters of the chosen layer groups, biases and normalisations too. w_0 are their values when this is
    built: build it when the source's weights are loaded.

    Args:
        model: whose parameters are penalised.
        strength: lambda, or C_l2 of Wiese et al.
        groups: of `layer_groups(model, ...)`; None: all parameters.

    Raises:
        ValueError: strength is negative; a group names a parameter that the model lacks; nothing is penalised.

    Source: Wiese, Weissenborn and Neves, CoNLL 2017.
    """

    def __init__(self, model: nn.Module, strength: float, groups: Sequence[LayerGroup] | None = None) -> None:
        parameters = chosen_parameters(model, None)
        if groups is not None:
            names = [name for group in groups for name in group.parameters]
            alien = next((name for name in names if name not in parameters), None)
            if alien is not None:
                raise ValueError(f"the groups name {alien!r}, which the model lacks; make them of this model")
            parameters = {name: parameters[name] for name in names}
        super().__init__(model, parameters)
        self.strength = check_factor("strength", strength)

    def factors(self) -> dict[str, float]:
        return dict.fromkeys(self.names, self.strength)

    def forward(self) -> Tensor:
        """The penalty, a scalar."""
        squares = [difference.square().sum() for _, difference in self.differences()]
        return self.strength * sum(squares[1:], squares[0])


class ConservativeOutputs(nn.Module):
    """The penalty

    .. code-block:: text

        strength D(source(x), model(x))

    on the target's inputs x, with D of `output_distance`: "kl" (KLD-regularised adaptation), "cross-entropy" (the
    forgetting cost of Wiese et al., C_fc) or "squared".

    The source is copied when this is built (`source`): frozen, in evaluation mode whatever `train()` says, part of
    this module's state_dict and of no other's.

    >>> loss = cross_entropy(model(x), y) + penalty(model(x), x)

    Args:
        source: the model before; it may be the one that is trained afterwards.
        strength: lambda.
        distance: D.

    Raises:
        ValueError: strength is negative, or there is no such distance.

    Source: Yu et al., ICASSP 2013; Wiese, Weissenborn and Neves, CoNLL 2017.
    """

    def __init__(self, source: nn.Module, strength: float, distance: Distance = "kl") -> None:
        super().__init__()
        if distance not in get_args(Distance):
            raise ValueError(f"distance is {distance!r}; 'kl', 'cross-entropy' or 'squared' is needed")
        self.strength, self.distance = check_factor("strength", strength), distance
        self.source = SourceModel(source)

    def forward(self, outputs: Tensor, *inputs: Any, mask: Tensor | None = None, **named: Any) -> Tensor:
        """The penalty for the model's outputs (examples, ..., K) on inputs that the source is called with.

        Raises:
            ValueError: the source's outputs, or the mask, are of another shape.
        """
        return self.strength * output_distance(outputs, self.source(*inputs, **named), self.distance, mask)


def interpolated_targets(labels: Tensor, source_outputs: Tensor, rho: float) -> Tensor:
    """Targets between the labels and what the source says:

    .. code-block:: text

        (1 - rho) onehot(y) + rho softmax(o0)

    Their cross-entropy is that of the labels plus lambda KL(p0 || p), times 1 - rho and up to a constant, for
    rho = lambda / (1 + lambda).

    >>> loss = torch.nn.functional.cross_entropy(model(x), interpolated_targets(y, penalty.source(x), 0.5))

    Args:
        labels: (...) class ids.
        source_outputs: (..., K), the source's logits.
        rho: from 0 (labels alone) to 1 (the source alone).

    Returns:
        (..., K) probabilities, without a gradient.

    Raises:
        ValueError: rho is not from 0 to 1, or the shapes do not fit.

    Source: Yu et al., ICASSP 2013.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho is {rho}; a number from 0 to 1 is needed")
    if labels.shape != source_outputs.shape[:-1]:
        raise ValueError(
            f"labels are {tuple(labels.shape)} and the source's outputs {tuple(source_outputs.shape)}; (...) and "
            "(..., classes) are needed"
        )
    probabilities = source_outputs.detach().softmax(-1, dtype=at_least_fp32(source_outputs.dtype))
    return (1 - rho) * F.one_hot(labels, source_outputs.size(-1)).to(probabilities.dtype) + rho * probabilities
