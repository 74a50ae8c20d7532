"""Whether transfer helps: runs with it against runs alone, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TransferEffect:
    """What transfer gains over training alone."""

    gain: float
    """mean over the pairs; above 0 is better"""
    standard_error: float
    """of that mean"""
    low: float
    """the 95% interval of the gain (paired, Student's t)"""
    high: float
    pairs: int
    verdict: Literal["helps", "hurts", "within noise"]

    def __str__(self) -> str:
        said = {"helps": "transfer helps", "hurts": "transfer hurts", "within noise": "the difference is within noise"}
        return (
            f"{said[self.verdict]}: {self.gain:+.4g} (standard error {self.standard_error:.2g}, 95% interval "
            f"{self.low:+.4g} to {self.high:+.4g}, {self.pairs} pairs)"
        )


def transfer_effect(
    with_transfer: Sequence[float], alone: Sequence[float], larger_is_better: bool = True
) -> TransferEffect:
    """The paired difference of scores with transfer and alone:

    .. code-block:: text

        d_i = with_i - alone_i                      or alone_i - with_i where smaller is better
        gain = mean d,   SE = sd(d) / sqrt(n)       sd with n - 1
        interval: gain -+ t_{0.975, n-1} SE
        "helps" where all of it is above 0,  "hurts" where all is below,  else "within noise"

    With 2 or 3 pairs the interval is wide (t = 12.7 and 4.3). Two standard errors, the rule for many pairs, would call
    noise a gain or a loss in 30 % and 18 % of all cases there.

    Args:
        with_transfer: scores, one a seed.
        alone: those of training alone, of the same seeds in the same order (and of the same test examples).
        larger_is_better: False for losses and errors.

    Raises:
        ValueError: not as many of both, fewer than 2, or a score that is no finite number.
    """
    if len(with_transfer) != len(alone):
        raise ValueError(
            f"there are {len(with_transfer)} scores with transfer and {len(alone)} alone; pairs are needed"
        )
    if len(alone) < 2:
        raise ValueError(f"there are scores of {len(alone)} seed(s); at least 2 are needed to know the noise")
    sign = 1 if larger_is_better else -1
    differences = [sign * (one - other) for one, other in zip(with_transfer, alone, strict=True)]
    if not all(math.isfinite(difference) for difference in differences):
        place = next(i for i, difference in enumerate(differences) if not math.isfinite(difference))
        raise ValueError(
            f"pair {place + 1} has the scores {with_transfer[place]} and {alone[place]}; finite numbers are needed"
        )
    count = len(differences)
    gain = math.fsum(differences) / count
    error = math.sqrt(math.fsum((d - gain) ** 2 for d in differences) / (count - 1) / count)
    verdict: Literal["helps", "hurts", "within noise"]
    reach = _t_quantile(count - 1) * error
    verdict = "helps" if gain > reach else "hurts" if gain < -reach else "within noise"
    return TransferEffect(gain, error, gain - reach, gain + reach, count, verdict)


def _t_quantile(freedom: int) -> float:
    """t with P(|Student's t| < t) = 0.95, by bisection over its angle atan(t / sqrt(freedom))."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 0.95 else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _t_within(angle: float, freedom: int) -> float:
    """P(|t| < tan(angle) sqrt(freedom)), as a finite sum (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    cosine = math.cos(angle)
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
