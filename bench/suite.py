"""The one benchmark: a peer on a case, in its turn.

`python -m bench` runs it with the right arguments; `pytest bench/suite.py --grid quick -k graph_mix` does too.
"""

from __future__ import annotations

import pytest

from bench.measure import gpu_seconds
from bench.peers import around

TURN_SECONDS = 0.15
ENOUGH_SECONDS = 25.0


def test_peer(case, peer, turn, benchmark, bench_session):
    running = bench_session.run(case)
    measured = running.prepare(peer)
    benchmark.group = case.id
    benchmark.extra_info.update(bench_session.facts(running, peer), turn=turn)
    if measured.work is None:
        message = f"{case.id}: {peer}: {measured.reason}"
        pytest.fail(message, pytrace=False) if peer == "glomo" else pytest.skip(message)
    if sum(measured.seconds) > ENOUGH_SECONDS:
        pytest.skip(f"{case.id}: {peer} has been measured long enough")
    with around(peer):
        if bench_session.device == "cpu":
            rounds = max(1, min(10, int(TURN_SECONDS / measured.estimate)))
            benchmark.pedantic(measured.work, rounds=rounds)
        else:
            times = gpu_seconds(measured.work)
            bench_session.clock.load(times)
            benchmark.pedantic(bench_session.clock.step, rounds=len(times))
    measured.seconds += benchmark.stats.stats.data
