"""Learning without Forgetting: on the target's data the old head says what it said before."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from glomo.nn.precision import wide
from glomo.transfer import examples
from glomo.transfer.closeness.anchors import check_factor
from glomo.transfer.closeness.source_model import SourceModel
from glomo.transfer.divergence import cross_entropy, log_probabilities, mean_or_zero, selected


def lwf_loss(
    logits: Tensor, old_logits: Tensor, temperature: float = 2.0, rescale: bool = True, mask: Tensor | None = None
) -> Tensor:
    """The mean over the examples (and positions) of the modified cross-entropy

    .. code-block:: text

        T^2 * - sum_k q'_k log p'_k,     p'_k = p_k^(1/T) / sum_j p_j^(1/T) = softmax(logits / T)_k

    and q' the same of the old logits.

    T^2 is there unless `rescale` is False (as in the paper): the gradient for a logit is (p'_k - q'_k) / T, and the
    difference itself shrinks as 1 / T, so that without T^2 a higher temperature would also mean a lower weight
    (Hinton et al. 2015).

    Args:
        logits: (examples, ..., K), the old head's now.
        old_logits: the same shape, the old head's before: logits, or log-probabilities, which give the same.
        temperature: T.
        rescale: whether to multiply by T^2.
        mask: (examples, ...) of bools: which positions count. The mean over none is 0.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.

    Source: Li and Hoiem, ECCV 2016, section 3.
    """
    _check_temperature(temperature)
    if logits.shape != old_logits.shape or logits.dim() < 2:
        raise ValueError(
            f"logits are {tuple(logits.shape)} and the old ones {tuple(old_logits.shape)}; one shape "
            "(examples, ..., classes) is needed"
        )
    logits, old_logits = selected(mask, wide(logits), old_logits.detach())
    targets = log_probabilities(old_logits.to(logits.dtype), temperature).exp()
    loss = mean_or_zero(cross_entropy(targets, log_probabilities(logits, temperature)))
    return temperature**2 * loss if rescale else loss


class LwF(nn.Module):
    """`weight` times `lwf_loss`, against outputs that were recorded once and are looked up by the example's index.

    The recorded outputs are a buffer, `recorded` (N, ..., K), which `load_state_dict` brings back whatever is recorded
    already: a run that goes on does not record again.

    >>> lwf = LwF().record(old_model, batches)
    >>> loss = cross_entropy(new_head(features), y) + lwf(old_head(features), indices)

    Args:
        temperature, rescale: of `lwf_loss`.
        weight: lambda_o.

    Raises:
        ValueError: a temperature that is not positive, a negative weight.

    Source: Li and Hoiem, ECCV 2016 (T 2, lambda_o 1).
    """

    recorded: Tensor

    def __init__(self, temperature: float = 2.0, weight: float = 1.0, rescale: bool = True) -> None:
        super().__init__()
        self.temperature, self.weight = _check_temperature(temperature), check_factor("weight", weight)
        self.rescale = rescale
        self.register_buffer("recorded", torch.empty(0))

    def record(self, model: nn.Module, batches: Iterable[Any]) -> LwF:
        """Keep what a model says, in evaluation mode, of the examples 0, 1, 2, ... in the order of the batches: read
        the data without shuffling them.

        Args:
            model: returns the old head's logits (examples, ..., K), of one shape for every example.
            batches: inputs (a tensor, or a dict of them by name), or pairs (inputs, labels), whose labels are not
                looked at; several inputs are a tuple, in such a pair.

        Raises:
            ValueError: there is no example; outputs are not one row for each, or of different shapes (`OnlineLwF` takes
                these).
            TypeError: a batch is something else, or an output is no tensor.
        """
        inputs = (examples.inputs_and_labels(batch)[0] for batch in batches)
        self.recorded = examples.all_outputs(model, inputs).to(self.recorded.device)
        return self

    def forward(self, logits: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of the old head's logits (examples, ..., K) on the examples with these indices (examples,).

        Raises:
            ValueError: nothing is recorded; an index that was not; shapes that do not fit.
        """
        count = len(self.recorded)
        if not count:
            raise ValueError("no outputs are recorded; call record(model, batches) before training")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count:
            raise ValueError(
                f"indices are from {int(indices.min())} to {int(indices.max())}; outputs of {count} examples are "
                f"recorded, 0 to {count - 1}"
            )
        old = self.recorded[indices.to(self.recorded.device)]
        return self.weight * lwf_loss(logits, old, self.temperature, self.rescale, mask)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "recorded")
        if saved is not None:
            self.recorded = self.recorded.new_empty(saved.shape, dtype=saved.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class OnlineLwF(nn.Module):
    """`LwF` that asks a copy of the old model at every step instead: for inputs that change (augmentation, dropout of
    units), outputs of different lengths, or more than is worth keeping.

    The copy (`source`) is frozen, in evaluation mode whatever `train()` says, and part of this module's state_dict.

    >>> loss = cross_entropy(new_head(features), y) + lwf(old_head(features), x)

    Args:
        source: the old model, which returns the old head's logits; it may be trained on afterwards.
        temperature, weight, rescale: of `LwF`.

    Raises:
        ValueError: a temperature that is not positive, a negative weight.

    Source: Li and Hoiem, ECCV 2016.
    """

    def __init__(self, source: nn.Module, temperature: float = 2.0, weight: float = 1.0, rescale: bool = True) -> None:
        super().__init__()
        self.temperature, self.weight = _check_temperature(temperature), check_factor("weight", weight)
        self.rescale = rescale
        self.source = SourceModel(source)

    def forward(self, logits: Tensor, *inputs: Any, mask: Tensor | None = None, **named: Any) -> Tensor:
        """The loss of the old head's logits (examples, ..., K) on inputs that the source is called with.

        Raises:
            ValueError: the source's logits, or the mask, are of another shape.
        """
        old = self.source(*inputs, **named)
        return self.weight * lwf_loss(logits, old, self.temperature, self.rescale, mask)


def _check_temperature(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; a positive finite number is needed")
    return temperature
