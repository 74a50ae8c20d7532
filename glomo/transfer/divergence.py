"""What losses between predictions share: divergences that stay numbers, means that are zero where nothing is left."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glomo.nn.precision import wide


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, in fp32 at least. Raises ValueError for a temperature
    that is not above 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; a number above 0 is needed")
    return (wide(logits) / temperature).log_softmax(-1)


def mean_log_probabilities(logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """The log of the mean of several models' probabilities, in logs throughout:

    .. code-block:: text

        log((1 / M) sum_m softmax(z_m / T)) = logsumexp_m(log_softmax(z_m / T)) - log M
    """
    stacked = torch.stack([log_probabilities(one, temperature) for one in logits])
    return stacked.logsumexp(0) - math.log(len(logits))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_k p_k (log p_k - log q_k), (..., K) -> (...): summed over classes. A class with p_k = 0 adds nothing, also
    where q_k is 0 (a logit of -inf in both: a class that is ruled out)."""
    absent = log_p.exp() == 0
    difference = log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)
    return (log_p.exp() * difference).sum(-1)


def cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """- sum_k p_k log q_k, (..., K) -> (...). A class with p_k = 0 adds nothing, also where q_k is 0."""
    return -(p * log_q.masked_fill(p == 0, 0.0)).sum(-1)


def selected(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors (..., K) at the places where the mask is true, as (M, K); all places without a mask.

    Raises:
        ValueError: the mask is not boolean, or not of the shape (...) of the first tensor.
    """
    places = tensors[0].shape[:-1]
    if mask is None:
        return tuple(tensor.reshape(-1, tensor.size(-1)) for tensor in tensors)
    if mask.dtype != torch.bool or mask.shape != places:
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; a boolean one of shape {tuple(places)} is needed"
        )
    return tuple(tensor[mask] for tensor in tensors)


def mean_or_zero(values: Tensor, count: int | None = None) -> Tensor:
    """The sum over `count`, or over how many there are; zero, not NaN, where there is none."""
    return values.sum() / max(values.numel() if count is None else count, 1)


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raises ValueError unless labels (...) go with logits (..., K)."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)} and logits {tuple(logits.shape)}; labels of shape "
            f"{tuple(logits.shape[:-1])} are needed, classes being the last dimension of the logits"
        )
