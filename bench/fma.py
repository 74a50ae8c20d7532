"""A Triton kernel that does nothing but fp32 multiply-adds. Imported only where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def fma_loop(out, steps, BLOCK: tl.constexpr):
    """Every element is a chain of its own: 1024 of them in 4 warps are 8 a thread, so that none waits for itself."""
    index = tl.arange(0, BLOCK)
    x = index.to(tl.float32) * 1e-6
    for _ in range(steps):
        x = x * 0.999 + 0.001
    tl.store(out + tl.program_id(0) * BLOCK + index, x)
