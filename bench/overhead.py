"""What the host spends on a call of relu2_attention beyond launching its kernel: `python -m bench.overhead`.

On a GPU the raw launch of the same kernel with the same arguments is timed beside the call (small tensors, so that the
host is what takes the time). Without one the kernel is left out, and `torch.add` on small tensors gives the scale.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before glomo is imported: then a CPU call reaches the Triton backend


def microseconds(call: Callable[[], object], calls: int = 50, rounds: int = 40) -> float:
    """Median over rounds of the host's time for one call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
        if GPU:
            torch.cuda.synchronize()
    return statistics.median(times[rounds // 4 :])


def main() -> int:
    import glomo
    from glomo.kernels import use_backend
    from glomo.kernels.launch import Launch

    device = "cuda" if GPU else "cpu"
    torch.set_num_threads(1)
    query, key, value = (torch.randn(2, 4, 64, 64, device=device, dtype=torch.float16) for _ in range(3))
    bias = torch.randn(4, 1, 1, device=device)
    launches: list[Launch] = []
    run = Launch.run

    def note(launch: Launch) -> None:
        launches.append(launch)
        if GPU:
            run(launch)

    def skip(launch: Launch) -> None:
        pass

    def call() -> object:
        return glomo.relu2_attention(query, key, value, bias, is_causal=True)

    with use_backend("triton"):
        with mock.patch.object(Launch, "run", note):
            call()
        if GPU:
            whole, raw = microseconds(call), microseconds(launches[0].run)
            print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
            print(f"call {whole:.1f} us, raw launch {raw:.1f} us, difference {whole - raw:.1f} us")
        else:
            with mock.patch.object(Launch, "run", skip):
                whole = microseconds(call)
            add = microseconds(lambda: query + key)
            print(f"CPU, torch {torch.__version__}: call without its kernel {whole:.1f} us, torch.add {add:.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
