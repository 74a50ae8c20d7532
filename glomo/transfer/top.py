"""Freezing all but the top, and feature extraction: one stage in which the last groups learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glomo.transfer.groups import LayerGroup
from glomo.transfer.schedules import Factor, constant
from glomo.transfer.stages import Stage


def freeze_all_but_top(
    groups: Sequence[LayerGroup], steps: int, lr: float, count: int = 1, schedule: Factor = constant
) -> Iterator[Stage]:
    """The last `count` groups learn. Dropout below them works as in training: they see the features with its noise.

    Raises:
        ValueError: count is not from 1 to the number of groups.

    Source: Long et al., ICML 2015.
    """
    yield Stage("top", steps, _top(groups, lr, count), schedule)


def feature_extraction(
    groups: Sequence[LayerGroup], steps: int, lr: float, count: int = 1, schedule: Factor = constant
) -> Iterator[Stage]:
    """The last `count` groups learn on features that are fixed: what is below them is in evaluation mode. A
    `glomo.transfer.ScalarMix` belongs to the groups that learn.

    Raises:
        ValueError: count is not from 1 to the number of groups.

    Source: Peters et al., NAACL 2018.
    """
    yield Stage("features", steps, _top(groups, lr, count), schedule, frozen="eval")


def _top(groups: Sequence[LayerGroup], lr: float, count: int) -> dict[str, float]:
    if not 1 <= count <= len(groups):
        raise ValueError(f"count is {count}; of {len(groups)} layer groups 1 to {len(groups)} can be the top")
    return {group.name: lr for group in groups[-count:]}
