import time

import pytest
import torch

from bench.measure import Replay, extra_memory
from bench.results import percentile


def test_extra_memory():
    assert 30 << 20 <= extra_memory(lambda: torch.ones(32 << 20, dtype=torch.uint8)) <= 60 << 20


@pytest.mark.benchmark(timer=(clock := Replay()))
def test_replayed_times_are_what_pytest_benchmark_records(benchmark):
    if not benchmark.enabled:
        pytest.skip("pytest-benchmark is off (under xdist)")
    clock.load([0.5, 0.25, 0.125])
    benchmark.pedantic(clock.step, rounds=3)
    assert benchmark.stats.stats.data == [0.5, 0.25, 0.125]


def test_replay_is_a_clock_that_stands_still_between_steps():
    clock = Replay()
    clock.load([0.5, 0.25])
    start = clock()
    time.sleep(0.001)
    clock.step()
    assert clock() - start == 0.5
    clock.step()
    assert clock() - start == 0.75


def test_percentiles():
    assert percentile([3.0, 1.0, 2.0], 0.2) == pytest.approx(1.4)
    assert percentile([7.0], 0.8) == 7.0
    assert percentile(range(101), 0.8) == 80
