"""The verdict on transfer against numbers worked out by hand, and against the published table of Student's t."""

import math
import statistics

import numpy as np
import pytest

from glomo.transfer.signal import transfer_effect
from glomo.transfer.signal.negative_transfer import _t_quantile

# two-sided 95%, from the tables of statistics textbooks
T_TABLE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    9: 2.262,
    10: 2.228,
    15: 2.131,
    29: 2.045,
    30: 2.042,
    60: 2.000,
    120: 1.980,
    100000: 1.960,
}


@pytest.mark.parametrize(("freedom", "value"), T_TABLE.items())
def test_student_t(freedom, value):
    assert _t_quantile(freedom) == pytest.approx(value, abs=6e-4)


def test_the_numbers():
    with_transfer, alone = [0.91, 0.90, 0.93, 0.88], [0.89, 0.90, 0.90, 0.87]
    found = transfer_effect(with_transfer, alone)
    differences = [0.02, 0.0, 0.03, 0.01]
    assert found.gain == pytest.approx(0.015)
    error = statistics.stdev(differences) / 2
    assert found.standard_error == pytest.approx(error)
    assert (found.low, found.high) == pytest.approx((0.015 - 3.1824 * error, 0.015 + 3.1824 * error), rel=1e-3)
    assert found.pairs == 4
    assert found.verdict == "within noise"  # the interval holds 0
    said = "the difference is within noise: +0.015 (standard error 0.0065, 95% interval -0.005543 to +0.03554, 4 pairs)"
    assert str(found) == said


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.16], "helps"),  # 1.08 > 12.706 * 0.08 = 1.016
        ([1.0, 1.18], "within noise"),  # 1.09 < 12.706 * 0.09 = 1.144
        ([-1.0, -1.16], "hurts"),
        ([1.0, -1.0, 0.5], "within noise"),
        ([0.0, 0.0], "within noise"),
        ([0.5, 0.5, 0.5], "helps"),
        ([-0.5, -0.5], "hurts"),
    ],
)
def test_verdicts(differences, verdict):
    found = transfer_effect(differences, [0.0] * len(differences))
    assert found.verdict == verdict
    assert {"helps": "transfer helps", "hurts": "transfer hurts", "within noise": "is within noise"}[verdict] in str(
        found
    )


def test_pairs_and_not_groups():
    """Seeds differ by far more than transfer does: only pairs show it."""
    alone = [0.1, 0.5, 0.9]
    assert transfer_effect([0.11, 0.511, 0.91], alone).verdict == "helps"
    assert transfer_effect([0.511, 0.11, 0.91], alone).verdict == "within noise"


def test_noise_is_seldom_called_a_gain():
    """Pairs without any effect: at most one in twenty verdicts is wrong, also with few pairs."""
    random = np.random.default_rng(0)
    for pairs in (2, 3, 5):
        draws = random.normal(size=(2000, pairs)).tolist()
        wrong = sum(transfer_effect(one, [0.0] * pairs).verdict != "within noise" for one in draws)
        assert 0.03 < wrong / 2000 < 0.07


def test_smaller_is_better():
    losses, alone = [1.0, 1.1, 0.9], [1.5, 1.55, 1.5]
    found = transfer_effect(losses, alone, larger_is_better=False)
    assert found.verdict == "helps"
    assert found.gain == pytest.approx(sum(b - a for a, b in zip(losses, alone, strict=True)) / 3)
    assert transfer_effect(losses, alone).verdict == "hurts"


def test_mistakes():
    with pytest.raises(ValueError, match=r"there are scores of 1 seed\(s\); at least 2 are needed"):
        transfer_effect([0.9], [0.8])
    with pytest.raises(ValueError, match="there are 3 scores with transfer and 2 alone"):
        transfer_effect([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"pair 2 has the scores nan and 0.5; finite numbers are needed"):
        transfer_effect([0.5, math.nan], [0.5, 0.5])
    with pytest.raises(ValueError, match="pair 1 has the scores inf and inf"):
        transfer_effect([math.inf, 1.0], [math.inf, 1.0])
