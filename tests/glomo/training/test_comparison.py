"""Means, spreads and paired differences, by hand."""

import json

import pytest

from glomo.training.comparison import Run, compare, table

RUNS = [
    Run("none", 0, 0.50, None, None, 1.0),
    Run("learned", 0, 0.60, 0.2, 0.0, 3.0),
    Run("none", 1, 0.70, None, None, 2.0),
    Run("learned", 1, 0.70, 0.4, 0.1, 5.0),
    Run("band", 0, 0.40, 0.9, 0.0, 1.0),
]


def test_numbers():
    found = compare(RUNS)
    json.dumps(found)
    assert found["graphs"]["none"]["mean"] == pytest.approx(0.6)
    assert found["graphs"]["none"]["std"] == pytest.approx(0.02**0.5)
    assert found["graphs"]["none"]["share_zero"] is None
    assert found["graphs"]["learned"]["share_zero"] == pytest.approx(0.3)
    assert found["graphs"]["learned"]["seconds"] == 4.0
    assert found["graphs"]["band"]["std"] is None
    difference = found["differences"]["learned - none"]
    assert (difference["mean"], difference["std"]) == (pytest.approx(0.05), pytest.approx(0.005**0.5))
    assert found["differences"]["learned - band"]["count"] == 1  # the common seed only
    assert compare(RUNS[:1])["differences"] == {}


def test_table():
    lines = table(compare(RUNS)).splitlines()
    assert lines[2].split() == ["none", "60.0", "±", "14.1", "+5.0", "±", "7.1", "1.5"]
    assert lines[3].split() == ["learned", "65.0", "±", "7.1", "30.0", "5.0", "4.0"]
