"""The C++ kernels for the CPU (csrc/), where the package was built with them.

They exist for several instruction sets, of which the widest that the CPU has is used; the environment variable
GLOMO_CPU_ISA names another.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

FILE = Path(__file__).with_name("cpu_kernels.so")


def _load() -> tuple[str | None, str]:
    """(why there are no C++ kernels, the instruction set in use)."""
    if not FILE.exists():
        return "this installation was built without the C++ kernels (pure Python)", ""
    try:
        torch.ops.load_library(str(FILE))
    except OSError as error:
        return f"the C++ kernels cannot be loaded ({error})", ""
    return None, torch.ops.glomo_cpu.instruction_set(os.environ.get("GLOMO_CPU_ISA", ""))


MISSING, INSTRUCTION_SET = _load()


def why_missing() -> str | None:
    """Why there are no C++ kernels, or None where there are.

    Raises:
        ValueError: GLOMO_CPU_ISA names an instruction set that does not exist, or that this CPU does not have.
    """
    if MISSING is None and not INSTRUCTION_SET:
        name = os.environ["GLOMO_CPU_ISA"]
        names = "portable, avx2, avx512 or avx512_bf16"
        raise ValueError(f"GLOMO_CPU_ISA is {name!r}, but must be {names}, if the CPU has it.")
    return MISSING
