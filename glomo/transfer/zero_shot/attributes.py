"""Zero-shot by attributes: predict what an example is like, and look up which class is like that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn.precision import wide
from glomo.transfer.zero_shot.tables import check_distinct


class AttributeTable(nn.Module):
    """Which attributes each class has, and direct attribute prediction (DAP) with it.

    A network gives one logit for each attribute, and learns them from classes that have examples (`loss`). A class
    without examples is found by its row in the table (`forward`):

    .. code-block:: text

        score(z | x) = sum_m log p(a_m = s_zm | x) - log p(a_m = s_zm),     p(a_m = 1 | x) = sigmoid(logit_m)

    where s_z is the class's signature, and the second term, the prior, is left out if none is given. The highest score
    wins, over whichever columns are in question: the unseen classes, or all.

    Args:
        classes: C names, with and without examples.
        signatures: (C, A), 0 or 1. No two rows may be equal.

    Raises:
        ValueError: there is not one row for each name, a value is neither 0 nor 1, two classes have one name or one
            signature.

    Source: Lampert, Nickisch & Harmeling, CVPR 2009, equations 2 and 3.
    """

    signatures: Tensor

    def __init__(self, classes: Sequence[str], signatures: Tensor | Sequence[Sequence[float]]) -> None:
        super().__init__()
        table = torch.as_tensor(signatures, dtype=torch.float32)
        if table.dim() != 2 or len(table) != len(classes) or not table.numel():
            raise ValueError(
                f"signatures have the shape {tuple(table.shape)} and there are {len(classes)} classes; "
                "(classes, attributes) is needed"
            )
        wrong = ((table != 0) & (table != 1)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            value = table[row, column].item()
            raise ValueError(f"attribute {column} of the class {classes[row]!r} is {value}; 0 or 1 is needed")
        check_distinct(classes, table, "signature")
        self.classes = list(classes)
        self.register_buffer("signatures", table.clone())

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over examples and attributes of the binary cross-entropy.

        Args:
            logits: (B, A).
            labels: (B,), ids of classes.

        Raises:
            ValueError: other shapes, or no example.
        """
        self._check(logits)
        if labels.shape != logits.shape[:1] or not len(labels):
            raise ValueError(
                f"labels have the shape {tuple(labels.shape)} and logits {tuple(logits.shape)}; one label for each "
                "example, and at least 1, are needed"
            )
        logits = wide(logits)
        return F.binary_cross_entropy_with_logits(logits, self.signatures[labels].to(logits.dtype))

    def prior(self, seen: Sequence[int]) -> Tensor:
        """p(a_m = 1), (A,): how many of the seen classes have an attribute. An attribute that all or none of them have
        says nothing of the others, and counts as 1/2.

        Raises:
            ValueError: no class, or an id that is none.
        """
        if not len(seen) or min(seen) < 0 or max(seen) >= len(self.classes):
            raise ValueError(f"seen classes are {list(seen)}; ids from 0 to {len(self.classes) - 1} are needed")
        mean = self.signatures[torch.as_tensor(list(seen), device=self.signatures.device)].mean(0)
        return torch.where((mean == 0) | (mean == 1), torch.full_like(mean, 0.5), mean)

    def forward(self, logits: Tensor, prior: Tensor | None = None) -> Tensor:
        """Scores (B, C): logarithms, up to a number that all classes of an example share.

        Args:
            logits: (B, A).
            prior: (A,), of `prior`, or none.

        Raises:
            ValueError: other shapes, or a prior that is not above 0 and below 1.
        """
        self._check(logits)
        logits = wide(logits)
        has = self.signatures.to(logits.dtype)
        with torch.autocast(logits.device.type, enabled=False):
            scores = F.logsigmoid(logits) @ has.T + F.logsigmoid(-logits) @ (1 - has).T
            if prior is None:
                return scores
            prior = prior.to(logits)
            if prior.shape != has.shape[1:] or not bool(((prior > 0) & (prior < 1)).all()):
                raise ValueError(
                    f"prior is {prior.tolist()}; {has.size(1)} probabilities above 0 and below 1 are needed"
                )
            return scores - has @ prior.log() - (1 - has) @ (1 - prior).log()

    def _check(self, logits: Tensor) -> None:
        attributes = self.signatures.size(1)
        if logits.dim() != 2 or logits.size(1) != attributes:
            raise ValueError(f"logits have the shape {tuple(logits.shape)}; (examples, {attributes}) is needed")
