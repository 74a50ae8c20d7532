"""Means, spreads and paired differences, by hand."""

import json

import pytest

from glomo.training.comparison import Run, compare, table

RUNS = [
    Run("none", 0, {"accuracy": 0.50, "other": 0.25}, None, None, 1.0),
    Run("learned", 0, {"accuracy": 0.60, "other": 0.25}, 0.2, 0.0, 3.0),
    Run("none", 1, {"accuracy": 0.70, "other": 0.25}, None, None, 2.0),
    Run("learned", 1, {"accuracy": 0.70, "other": 0.25}, 0.4, 0.1, 5.0),
    Run("band", 0, {"accuracy": 0.40, "other": 0.25}, 0.9, 0.0, 1.0),
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
    assert difference["error"] == pytest.approx(0.005**0.5 / 2**0.5)
    assert found["differences"]["learned - band"]["count"] == 1  # the common seed only
    assert compare(RUNS[:1])["differences"] == {}


def test_table():
    lines = table(compare(RUNS)).splitlines()
    # the difference with its standard error: 7.1 of two seeds
    assert lines[2].split() == ["none", "60.0", "±", "14.1", "25.0", "+5.0", "±", "5.0", "1.5"]
    assert lines[3].split() == ["learned", "65.0", "±", "7.1", "25.0", "30.0", "5.0", "4.0"]
    assert compare(RUNS, "other")["graphs"]["none"]["mean"] == 0.25
