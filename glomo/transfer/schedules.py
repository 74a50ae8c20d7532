"""Learning rates over time, as factors of the highest rate: plain functions of (step, steps), steps counted from 0.

`SlantedTriangular` and `schedule` make schedulers of `torch.optim` of them; the training loop calls them itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Factor = Callable[[int, int], float]
"""(step, steps) -> a number from 0 to 1"""


def slanted_triangular(step: int, steps: int, cut_frac: float = 0.1, ratio: float = 32.0) -> float:
    """Up along a line for a share `cut_frac` of the steps, then down along a line:

    .. code-block:: text

        cut = max(1, floor(steps * cut_frac))
        p   = step / cut                            if step < cut
              1 - (step - cut) / (steps - cut)      otherwise
        factor = (1 + p * (ratio - 1)) / ratio

    Never below 1 / ratio: as printed in the paper the way down is cut * (1 / cut_frac - 1) steps long, which is short
    of `steps - cut` where steps * cut_frac is no whole number, and the rate becomes negative in the end.

    Raises:
        ValueError: cut_frac is not above 0 and below 1, or ratio below 1.

    Source: Howard & Ruder, ACL 2018, section 3.2.
    """
    if not (0 < cut_frac < 1 and ratio >= 1):
        raise ValueError(
            f"cut_frac is {cut_frac} and ratio {ratio}; a share above 0 and below 1, and at least 1, are needed"
        )
    cut = max(1, math.floor(steps * cut_frac + 1e-9))
    p = step / cut if step < cut else 1 - (step - cut) / max(1, steps - cut)
    return (1 + min(1.0, max(0.0, p)) * (ratio - 1)) / ratio


def warmup(step: int, warmup_steps: int) -> float:
    """(step + 1) / warmup_steps, at most 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def linear(step: int, steps: int, warmup_steps: int = 0) -> float:
    """Warm-up, then down along a line to 0 at the last step."""
    return warmup(step, warmup_steps) * max(0.0, 1.0 - _done(step, steps, warmup_steps))


def cosine(step: int, steps: int, warmup_steps: int = 0) -> float:
    """Warm-up, then 0.5 (1 + cos(pi done)), which is 0 at the last step."""
    done = min(1.0, _done(step, steps, warmup_steps))
    return warmup(step, warmup_steps) * 0.5 * (1.0 + math.cos(math.pi * done))


def inverse_sqrt(step: int, steps: int, warmup_steps: int = 0) -> float:
    """Warm-up, then sqrt(warmup_steps / (step + 1)).

    Source: Vaswani et al., NeurIPS 2017, section 5.3.
    """
    return warmup(step, warmup_steps) if step < warmup_steps else math.sqrt(max(warmup_steps, 1) / (step + 1))


def constant(step: int, steps: int, warmup_steps: int = 0) -> float:
    """Warm-up, then 1."""
    return warmup(step, warmup_steps)


def schedule(optimizer: torch.optim.Optimizer, factor: Factor, steps: int, **options: Any) -> Any:
    """A `torch.optim.lr_scheduler.LambdaLR` that multiplies every parameter group's rate by factor(step, steps,
    **options); call its `step()` behind the optimizer's."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(min(step, steps - 1), steps, **options))


def SlantedTriangular(optimizer: torch.optim.Optimizer, steps: int, cut_frac: float = 0.1, ratio: float = 32.0) -> Any:
    """`schedule` with `slanted_triangular`."""
    return schedule(optimizer, slanted_triangular, steps, cut_frac=cut_frac, ratio=ratio)


def _done(step: int, steps: int, warmup_steps: int) -> float:
    """The share of what follows the warm-up that is behind once this step is done; 0 within the warm-up."""
    return max(0.0, (step + 1 - warmup_steps) / max(1, steps - warmup_steps))
