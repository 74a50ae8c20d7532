"""Erasure: how much worse the right label does without a part of the representation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glomo.nn.precision import wide
from glomo.transfer.probing.evaluation import hooked

Unit = TypeVar("Unit")


class Importance(NamedTuple):
    """What erasing does to the score S of examples, such as the log-probability of their right label."""

    score: Tensor
    """(N,), S(e)"""
    change: Tensor
    """(N, parts), S(e) - S(e, without the part): above zero where the part helps"""

    @property
    def relative(self) -> Tensor:
        """(N, parts), (S(e) - S(e, without the part)) / |S(e)|; zero where nothing changes. The mean over examples is
        the importance of a part. (The size of S(e) divides, so that a part that helps is above zero whether scores are
        log-probabilities, which are negative, or probabilities.)"""
        size = self.score.abs()[:, None]
        return torch.where(self.change == 0, 0.0, self.change / size)


@torch.no_grad()
def erase_features(
    score: Callable[[Tensor], Tensor],
    features: Tensor,
    groups: Sequence[Sequence[int]] | None = None,
    fill: float | Tensor = 0.0,
) -> Importance:
    """The importance of dimensions of features, or of groups of them:

    .. code-block:: text

        S(e) - S(e, without d),    features_d of e set to `fill` in S(e, without d)

    Args:
        score: features (N, ..., dim) -> (N,), each row's score from that row alone.
        features: (N, ..., dim); a group is erased in all places between.
        groups: dimensions that are erased together; none: each alone.
        fill: a number, or (dim,), such as the mean of the training features.

    Raises:
        ValueError: a dimension is not there, a group is empty, the score is not (N,), or fill has not dim numbers.

    Source: Li, Monroe & Jurafsky, arXiv 1612.08220, section 3.
    """
    if features.dim() < 2:
        raise ValueError(f"the features are {tuple(features.shape)}; (N, ..., dim) is needed")
    dim = features.size(-1)
    values = torch.as_tensor(fill, dtype=features.dtype, device=features.device)
    if values.shape not in ((), (dim,)):
        raise ValueError(f"fill is {tuple(values.shape)}; a number, or ({dim},), is needed")
    chosen = [[d] for d in range(dim)] if groups is None else [_checked(group, dim) for group in groups]
    whole, changes = _scores(score, features), []
    for group in chosen:
        without = features.clone()
        without[..., group] = values.expand(dim)[group]
        changes.append(whole - _scores(score, without))
    return Importance(whole, torch.stack(changes, 1) if changes else whole.new_zeros(len(whole), 0))


def erase_words(
    score: Callable[[list[Unit]], float | Tensor], units: Sequence[Unit], replacement: Unit | None = None
) -> Importance:
    """The importance of each unit of a text: it is left out, or a replacement (such as the unknown unit) stands for it.

    Args:
        score: a text of units -> its score.
        units: T of them, ids or words.
        replacement: none: the unit is left out.

    Returns:
        score (1,) and change (1, T), in fp64.

    Raises:
        ValueError: there is no unit, or only one and no replacement.

    Source: Li, Monroe & Jurafsky, arXiv 1612.08220, section 3.
    """
    if len(units) < 1 or (len(units) == 1 and replacement is None):
        raise ValueError(f"the text has {len(units)} units; 1 with a replacement, or 2 to leave one out, are needed")
    middle = [] if replacement is None else [replacement]
    with torch.no_grad():
        whole = float(score(list(units)))
        without = [float(score([*units[:t], *middle, *units[t + 1 :]])) for t in range(len(units))]
    found = torch.tensor([without], dtype=torch.float64)
    return Importance(torch.tensor([whole], dtype=torch.float64), whole - found)


@contextmanager
def erased(module: nn.Module, dimensions: Sequence[int], fill: float | Tensor = 0.0) -> Iterator[None]:
    """Inside the block these dimensions of a module's output, the last one, are `fill`: a group of neurons of a hidden
    layer is erased, and a model can be judged without it. Of an output that is a tuple the first part is meant.

    Args:
        module: any, such as `model.layers[1]`.
        dimensions: of its output.
        fill: a number, or (dim,).

    Raises:
        ValueError: a dimension is not there (when the module runs).
    """

    def place(module: nn.Module, name: str) -> RemovableHandle:
        def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            group = _checked(dimensions, x.size(-1))
            kept = torch.ones(x.size(-1), dtype=torch.bool, device=x.device)
            kept[group] = False
            changed = torch.where(kept, x, torch.as_tensor(fill, dtype=x.dtype, device=x.device))
            if not isinstance(output, tuple):
                return changed
            parts = (changed, *output[1:])
            return type(output)(*parts) if hasattr(output, "_fields") else parts

        return module.register_forward_hook(replace)

    with hooked({"": module}, place):
        yield


def _checked(group: Sequence[int], dim: int) -> list[int]:
    if not len(group) or min(group) < 0 or max(group) >= dim:
        raise ValueError(f"a group of dimensions is {list(group)}; at least one, from 0 to {dim - 1}, is needed")
    return list(group)


def _scores(score: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    found = score(features)
    if found.shape != features.shape[:1]:
        raise ValueError(f"the score is {tuple(found.shape)}; ({len(features)},), one a row, is needed")
    return wide(found.detach())
