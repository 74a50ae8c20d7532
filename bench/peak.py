"""The speed that a result is a share of, measured on the device in the same run: a matrix product of the dtype, and for
fp32 on a GPU, where the product may be slower than the units allow, also a loop of multiply-adds."""

from __future__ import annotations

import time

import torch

from bench.cases import DTYPES
from bench.measure import Work, gpu_seconds


def peak_flops(device: str, dtype: str) -> float:
    """FLOP/s: the best of a few."""
    size = 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype]).unbind()
    product = 2 * size**3 / min(_seconds(lambda: torch.mm(a, b), device))
    return max(product, _fma_flops()) if device != "cpu" and dtype == "fp32" else product


def _seconds(work: Work, device: str) -> list[float]:
    if device != "cpu":
        return gpu_seconds(work)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def _fma_flops(steps: int = 4096, block: int = 1024) -> float:
    from bench.fma import fma_loop

    programs = 64 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * block, device="cuda")
    seconds = gpu_seconds(lambda: fma_loop[(programs,)](out, steps, BLOCK=block, num_warps=4))
    return 2 * steps * block * programs / min(seconds)
