"""ConSE: a classifier of seen classes becomes one of unseen ones, without training."""

from __future__ import annotations

import torch
from torch import Tensor

from glomo.nn.precision import wide


def conse_embedding(probabilities: Tensor, labels: Tensor, top: int = 10) -> Tensor:
    """Where an example is among the labels' vectors, by a classifier's most probable classes, (B, dim):

    .. code-block:: text

        f(x) = (1 / Z) sum_{t = 1..T} p(y_t | x) s(y_t),     Z = sum_{t = 1..T} p(y_t | x)

    where y_t is the t-th most probable seen class and s its vector. `label_scores(f, unseen, cosine=True)` then gives
    the nearest unseen label. A classifier of fewer than T classes gives all of them.

    Args:
        probabilities: (B, C), over the seen classes: after the softmax.
        labels: (C, dim), of `label_vectors`.
        top: the formula's T.

    Raises:
        ValueError: other shapes, top below 1, or probabilities that are negative or all 0 for an example.

    Source: Norouzi et al., ICLR 2014, equation 2.
    """
    if probabilities.dim() != 2 or labels.dim() != 2 or probabilities.size(1) != len(labels) or not len(labels):
        raise ValueError(
            f"probabilities have the shape {tuple(probabilities.shape)} and labels {tuple(labels.shape)}; "
            "(examples, classes) and (classes, dim) are needed"
        )
    if top < 1:
        raise ValueError(f"top is {top}; at least 1 is needed")
    probabilities = wide(probabilities)
    if not bool((probabilities >= 0).all() and (probabilities.sum(1) > 0).all()):
        raise ValueError(
            f"probabilities go down to {probabilities.min().item():.4g}; at least 0, and above 0 for a class of each "
            "example, is needed: take the softmax of logits first"
        )
    best, classes = probabilities.topk(min(top, len(labels)), dim=1)
    weights = torch.zeros_like(probabilities).scatter(1, classes, best / best.sum(1, keepdim=True))
    with torch.autocast(labels.device.type, enabled=False):
        return weights @ labels.to(weights.dtype)
