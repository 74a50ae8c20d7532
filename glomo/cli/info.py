"""``glomo info``: versions, and which backend every op runs on here, and why."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from glomo.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Print what runs here."""
    if argv and argv[0] not in ("-h", "--help"):
        raise UserError(f"`glomo info` takes no arguments, but has {argv[0]!r}")
    if argv:
        print("usage: glomo info\n\nprints versions, devices and the backend of every op, with the reason.")
        return 0
    import torch

    from glomo.kernels import BACKENDS, cpu_library, explain
    from glomo.kernels.backend import OPS

    print(f"glomo {version('glomo')}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"torch {torch.__version__}, triton {_version('triton')}, safetensors {_version('safetensors')}")
    extras = ("tqdm", "tokenizers", "matplotlib")
    found = [name for name in extras if importlib.util.find_spec(name)]
    missing = [name for name in extras if name not in found]
    print(f"extras: {', '.join(found) or 'none'}" + (f"; not installed: {', '.join(missing)}" if missing else ""))
    print(f"CPU: {_cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        print(f"GPU: {names}, CUDA {torch.version.cuda}")
    else:
        print("GPU: none that PyTorch can use")
    absent = cpu_library.why_missing()
    print(f"C++ kernels: none: {absent}" if absent else f"C++ kernels: built; {cpu_library.INSTRUCTION_SET} runs here")
    print("\nbackends")
    for name, meaning in BACKENDS.items():
        print(f"  {name:<10} {meaning}")
    print("\nops")
    for op in OPS:
        print(f"  {explain(op)}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
