"""Time and memory of one call."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

Work = Callable[[], object]


class Replay:
    """A clock that moves only by times measured elsewhere: how CUDA-event times come into pytest-benchmark.

    Give it as the benchmark's timer and call `step` as the benchmarked function: every round lasts the next time.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._pending: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self._now

    def load(self, seconds: Sequence[float]) -> None:
        self._now, self._pending = 0.0, iter(seconds)

    def step(self) -> None:
        self._now += next(self._pending)


def gpu_seconds(work: Work, milliseconds: float = 50, most: int = 50) -> list[float]:
    """Seconds of calls by CUDA events, the L2 cache flushed before each (Triton's do_bench), thinned to `most`."""
    from triton.testing import do_bench

    times = do_bench(work, warmup=10, rep=milliseconds, return_mode="all")
    return [t / 1000 for t in times[:: -(-len(times) // most)]]


def peak_memory(work: Work, device: str) -> int | None:
    """Bytes that a call takes at its peak, above what was there before; None where the system does not tell."""
    if device == "cpu":
        try:
            return extra_memory(work)
        except OSError:  # no /proc/self/clear_refs: not Linux, or a container that forbids it
            return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def extra_memory(work: Work) -> int:
    """Bytes by which the process's peak resident memory rises above its level before the call (Linux).

    Call the work once before, so that what it allocates for good stays out.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator kept would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from the present level
    before = _kilobytes("/proc/self/status", "VmRSS")
    work()
    return max(_kilobytes("/proc/self/status", "VmHWM") - before, 0) * 1024


def free_memory() -> float:
    """Bytes of the CPU's memory that can still be had; infinite where the system does not tell."""
    try:
        return _kilobytes("/proc/meminfo", "MemAvailable") * 1024
    except OSError:
        return float("inf")


def _kilobytes(path: str, key: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise OSError(f"{path} has no {key}")
