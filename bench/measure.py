"""Times and memory of callables, side by side in one run."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def timings(works: Mapping[str, Work], rounds: int = 15, warmup: int = 2) -> dict[str, Timing]:
    """Calls the works in turn, round by round, so that a disturbance of the machine hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(warmup + rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    result = {}
    for name, values in seconds.items():
        cuts = statistics.quantiles(values, n=5)
        result[name] = Timing(statistics.median(values), cuts[0], cuts[3])
    return result


def extra_memory(work: Work) -> int:
    """Bytes by which the process's peak resident memory rises above its level before the call (Linux)."""
    work()  # what is allocated once stays out
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator kept would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from the present level
    before = _status("VmRSS")
    work()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
