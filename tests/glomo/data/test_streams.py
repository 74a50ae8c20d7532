"""Streams: every unit in one window of every epoch, and the same windows every time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glomo.data.streams import StreamBatches
from glomo.errors import UserError


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 9), st.integers(1, 90), st.integers(0, 5), st.booleans())
def test_every_epoch_reads_every_column_once(count, rows, length, seed, jitter):
    if count < rows:
        return
    batches = StreamBatches(count, rows, length, seed, jitter)
    assert batches.columns * rows + batches.left_out == count
    assert 0 <= batches.left_out < rows
    for epoch in range(3):
        read = 0
        for place in range(len(batches)):
            step = epoch * len(batches) + place
            start, size = batches.window(step)
            assert start == read
            assert 1 <= size <= (length + 20 if jitter else length)
            assert batches.begins_epoch(step) == (place == 0)
            assert batches.batch(step) == list(range(rows))
            if place < len(batches) - 1:
                assert size >= min(length, 5) if jitter else size == length
            read += size
        assert read == batches.columns


def test_a_step_is_a_pure_function():
    batches = StreamBatches(50_000, 3, 20, seed=1)
    steps = [0, 2500, 7, 1, 2 * len(batches), 2500]
    found = [batches.window(step) for step in steps]
    assert found == [StreamBatches(50_000, 3, 20, seed=1).window(step) for step in steps]
    assert found != [StreamBatches(50_000, 3, 20, seed=2).window(step) for step in steps]
    epochs = [[batches.window(e * len(batches) + i) for i in range(len(batches))] for e in range(2)]
    assert epochs[0] != epochs[1]  # the ends of windows lie elsewhere


def test_lengths_are_those_of_the_paper():
    batches = StreamBatches(4_000_000, 1, 70, seed=0)
    sizes = np.array([batches.window(step)[1] for step in range(len(batches) - 1)])
    assert abs((sizes < 52).mean() - 0.05) < 0.005
    assert abs(sizes[sizes >= 52].mean() - 69.5) < 0.2  # rounded down
    assert abs(sizes[sizes >= 52].std() - 5) < 0.2
    assert abs(sizes[sizes < 52].mean() - 34.5) < 0.5


def test_without_jitter():
    batches = StreamBatches(32, 3, 4, seed=0, jitter=False)
    assert (batches.columns, batches.left_out, len(batches)) == (10, 2, 3)
    assert [batches.window(step) for step in range(4)] == [(0, 4), (4, 4), (8, 2), (0, 4)]
    assert len(StreamBatches(8, 1, 4, seed=0, jitter=False)) == 2


def test_too_little_text():
    with pytest.raises(UserError, match="the text has 3 units to predict, too few for 4 rows"):
        StreamBatches(3, 4, 70, seed=0)
    with pytest.raises(UserError, match="0 rows and 70 columns"):
        StreamBatches(3, 0, 70, seed=0)
