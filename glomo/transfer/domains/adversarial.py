"""Domain-adversarial training: a classifier of domains, and features that it cannot tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn.precision import wide
from glomo.transfer.domains.gradient_reversal import GradientReversal


class DomainLoss(NamedTuple):
    """What a domain classifier makes of a batch."""

    loss: Tensor
    """to be added to the task's loss"""
    chance: float
    """ln K, the loss of a classifier that knows nothing: 0.693 with two domains"""
    accuracy: Tensor
    """share of right domains, the mean of the domains' shares; 1 / K is chance"""


class DomainAdversary(nn.Module):
    """A classifier of K domains behind a gradient reversal. It learns to tell the domains apart, while what makes its
    features learns to prevent that:

    .. code-block:: text

        loss = (1 / K) sum_k (1 / n_k) sum_{i of domain k} -log softmax(classifier(f_i))_k
        d loss / d f is turned round and weighted by lambda_p; the classifier's own gradient is not

    Every domain counts 1 / K, however many examples it has. A loss that stays near ln K (0.693 with two domains) is no
    fault: it is where features without a domain end. Call `advance()` once after each training step, see
    `GradientReversal`.

    Args:
        features: width of the features.
        hidden: widths of the hidden layers of the classifier, with ReLU; () makes it linear.
        domains: how many, K.
        steps: training steps altogether.
        gamma: see `dann_weight`.

    Raises:
        ValueError: a width is below 1, domains below 2, or steps below 1.

    Source: Ganin et al., JMLR 2016.
    """

    def __init__(self, features: int, hidden: Sequence[int], domains: int, steps: int, gamma: float = 10.0) -> None:
        super().__init__()
        widths = [features, *hidden]
        if min(widths) < 1:
            raise ValueError(f"features is {features} and hidden {tuple(hidden)}; widths of at least 1 are needed")
        if domains < 2:
            raise ValueError(f"domains is {domains}; at least 2 are needed to tell apart")
        self.reversal = GradientReversal(steps, gamma)
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.ReLU()]
        self.classifier = nn.Sequential(*layers, nn.Linear(widths[-1], domains))
        self.features = features
        self.domains = domains

    def advance(self) -> None:
        """One training step is done."""
        self.reversal.advance()

    def forward(self, *features: Tensor) -> DomainLoss:
        """The loss of a batch.

        Args:
            features: one tensor (..., features) for each domain, in a fixed order, usually of `joint_features`. All
                leading dimensions count as examples; the domains may have different numbers of them.

        Raises:
            ValueError: there is not one tensor for each domain, a domain has no example, or another width.
        """
        self._check(features)
        rows = [part.flatten(0, -2) for part in features]
        logits = self.classifier(self.reversal(torch.cat(rows)))
        logits = wide(logits)
        losses, shares = [], []
        for domain, part in enumerate(logits.split([len(row) for row in rows])):
            wanted = torch.full((len(part),), domain, device=part.device)
            losses.append(F.cross_entropy(part, wanted))
            shares.append((part.detach().argmax(-1) == wanted).float().mean())
        return DomainLoss(torch.stack(losses).mean(), math.log(self.domains), torch.stack(shares).mean())

    def _check(self, features: Sequence[Tensor]) -> None:
        if len(features) != self.domains:
            raise ValueError(
                f"features of {len(features)} domains are given; {self.domains} are needed, one tensor each"
            )
        for domain, part in enumerate(features):
            if part.dim() < 2 or part.size(-1) != self.features:
                raise ValueError(
                    f"features of domain {domain} have the shape {tuple(part.shape)}; (..., {self.features}) is needed"
                )
            if not part.numel():
                sizes = ", ".join(str(math.prod(other.shape[:-1])) for other in features)
                raise ValueError(
                    f"domain {domain} has no example in the batch (the domains have {sizes}); each needs at least 1"
                )


def joint_features(encoder: Callable[[Tensor], Tensor], *batches: Tensor) -> list[Tensor]:
    """The features of several domains' batches by one pass of all of them together, one tensor for each domain.

    BatchNorm then takes its statistics over the joint batch. With a pass for each domain it would normalise every
    domain by its own statistics in training, and by running ones of both in evaluation.

    Args:
        encoder: (N, ...) -> features, one row for each example.
        batches: one tensor for each domain, equal but for their numbers of examples.

    Raises:
        ValueError: the batches differ in more than their first dimension, or the encoder gives another number of rows.
    """
    shapes = [tuple(batch.shape) for batch in batches]
    if not batches or any(len(shape) < 1 or shape[1:] != shapes[0][1:] for shape in shapes):
        given = ", ".join(map(str, shapes)) or "none"
        raise ValueError(f"batches that are equal but for their first dimension are needed; given are {given}")
    features = encoder(torch.cat(batches))
    sizes = [len(batch) for batch in batches]
    if len(features) != sum(sizes):
        raise ValueError(f"the encoder gives {len(features)} rows for {sum(sizes)} examples; one each is needed")
    return list(features.split(sizes))
