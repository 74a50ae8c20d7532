"""Slice-based learning: heads of their own for the kinds of examples that matter or that are hard."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn.precision import wide
from glomo.transfer.divergence import check_labels, log_probabilities, mean_or_zero

Example = TypeVar("Example")


def slice_members(examples: Iterable[Example], slices: Mapping[str, Callable[[Example], bool]]) -> Tensor:
    """Which examples are in which slices, (N, S) bool: column j is the j-th slicing function's.

    Args:
        examples: whatever the functions read, such as texts.
        slices: {slice: function from an example to whether it is a member}. Slices may overlap, or be empty.
    """
    rows = [[bool(member(example)) for member in slices.values()] for example in examples]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(slices))


class SliceHeads(nn.Module):
    """A head whose features are mixed from those of experts, one for each slice:

    .. code-block:: text

        r_0 = z,  q_0 = 1                                   all examples: the features as they are
        r_i = W_i z + b_i,  q_i = sigmoid(u_i z + c_i)      slice i: the expert's, and whether z is a member
        a   = softmax_i(q_i max_k softmax(p(r_i))_k)        indicator times confidence, i = 0 .. S
        y   = head(sum_i a_i r_i)

    p is a prediction head that all experts share; it begins as a copy of `head`. Which slices an example is in has to
    be known in training only. Without slices the module is `head`.

    Args:
        head: features (B, dim) to logits (B, K).
        dim: of the features z.
        slices: names, in the order of the columns of `slice_members`.

    Raises:
        ValueError: two slices of one name; in `loss`, shapes that do not fit.

    Source: Chen et al., NeurIPS 2019; the attention for any number of classes is that of their program.
    """

    def __init__(self, head: nn.Module, dim: int, slices: Sequence[str]) -> None:
        super().__init__()
        self.slices = tuple(slices)
        twice = next((name for name in self.slices if self.slices.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two slices are called {twice!r}; each needs a name of its own")
        self.head = head
        self.predictor = copy.deepcopy(head) if slices else None
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in slices)
        self.indicators = nn.Linear(dim, len(self.slices)) if slices else None

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self._heads(features)[0]

    def loss(self, features: Tensor, labels: Tensor, members: Tensor) -> Tensor:
        """The loss of the mixture, and those of the slices:

        .. code-block:: text

            CE(y) + CE(p(r_0)) + sum_i (BCE(q_i, member_i) + CE(p(r_i)) over the members of i)

        each a mean over the batch, and an expert's over the members in it: zero where there is none. Without slices
        it is CE(y) alone.

        Args:
            features: (B, dim).
            labels: (B,) int64.
            members: (B, S) bool, rows of `slice_members`.
        """
        needed = (len(features), len(self.slices))
        if members.dtype != torch.bool or members.shape != needed:
            raise ValueError(
                f"members are {members.dtype} of shape {tuple(members.shape)}; booleans of shape {needed}, examples by "
                "slices, are needed"
            )
        logits, predictions, indicated = self._heads(features)
        check_labels(labels, logits)
        total = mean_or_zero(_cross_entropy(logits, labels))
        if indicated is None:
            return total
        everyone = torch.ones_like(members[:, 0])
        for prediction, chosen in zip(predictions, [everyone, *members.unbind(1)], strict=True):
            total = total + mean_or_zero(_cross_entropy(prediction[chosen], labels[chosen]))
        indicated = wide(indicated)
        entropies = F.binary_cross_entropy_with_logits(indicated, members.to(indicated.dtype), reduction="none")
        return total + mean_or_zero(entropies, len(features))

    def _heads(self, features: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Logits of the mixture, those of every expert, and those of the indicators."""
        if self.predictor is None or self.indicators is None:
            return self.head(features), [], None
        experts = [features, *(expert(features) for expert in self.experts)]
        predictions = [self.predictor(expert) for expert in experts]
        indicated = self.indicators(features)
        confidence = torch.stack([log_probabilities(one).amax(-1).exp() for one in predictions], -1)
        member = F.pad(indicated.sigmoid(), (1, 0), value=1.0)
        attention = (member * confidence).softmax(-1).to(features.dtype)
        mixed = (attention[..., None] * torch.stack(experts, 1)).sum(1)
        return self.head(mixed), predictions, indicated


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(log_probabilities(logits), labels, reduction="none")
