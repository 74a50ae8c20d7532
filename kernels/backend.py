"""Which implementation of an op runs: the automatic choice, and how to force one.

A backend is forced for a block of code by `use_backend("reference")` and for a process by the environment variable
GLOMO_BACKEND. A forced backend that cannot do a call raises; the automatic choice falls back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from . import cpu_library
from .configurations import tf32_allowed

BACKENDS = {
    "reference": "plain PyTorch, the definition; keeps whole T x S tensors",
    "blocked": "plain PyTorch over blocks of targets; memory linear in T",
    "cpu": "fused C++ kernels for the CPU, threads and vector instructions",
    "triton": "fused GPU kernels; on the CPU only in Triton's interpreter, for tests",
}
OPS = (
    "relu2_affinity",
    "relu2_attention",
    "relu2_attention_varlen",
    "graph_mix",
    "relu2_graph_mix",
    "attention",
    "attention_varlen",
)

TRITON_WIDTH = 256
"""The widest query that the Triton kernels hold in one tile."""
TRITON_FP32_WIDTH = 64
"""The widest query or value in full fp32, without tensor cores, and in fp32 at all on AMD GPUs: beyond, registers spill
and plain PyTorch is faster."""
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_forced: str | None = None


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, but the backends are {', '.join(BACKENDS)}.")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the block on the named backend ("reference", "blocked", "cpu" or "triton").

    The block is process-wide state, as torch.set_float32_matmul_precision is: set it from one thread. A function that
    torch.compile has traced keeps the backend that GLOMO_BACKEND named when it was traced.

    Raises:
        ValueError: no backend has that name.

    Example:
        >>> with glomo.kernels.use_backend("reference"):
        ...     out = glomo.relu2_attention(query, key, value)
    """
    global _forced
    before, _forced = _forced, _check_name(name, "use_backend's name")
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> tuple[str, str] | None:
    """(name, who forced it), or None where the choice is automatic."""
    if _forced is not None:
        return _forced, "use_backend"
    name = os.environ.get("GLOMO_BACKEND")
    if name:
        return _check_name(name, "The environment variable GLOMO_BACKEND"), "GLOMO_BACKEND"
    return None


def select_backend(op: str, *tensors: Tensor) -> str:
    """The backend that this call of `glomo.<op>` runs on; tensors begins with the query.

    Raises:
        ValueError: the forced backend cannot do this call.
    """
    forced = forced_backend()
    if forced is None:
        best = "triton" if tensors[0].device.type == "cuda" else "cpu"
        return "blocked" if why_not(best, op, *tensors) else best
    name, who = forced
    reason = why_not(name, op, *tensors)
    if reason:
        raise ValueError(f"{who} forces the backend {name!r}, but {reason}.")
    return name


def why_not(name: str, op: str, *tensors: Tensor) -> str | None:
    """Why a backend cannot do a call, or None where it can."""
    if name == "triton":
        return why_not_triton(op, *tensors)
    return why_not_cpu(op, *tensors) if name == "cpu" else None


def why_not_cpu(op: str, *tensors: Tensor) -> str | None:
    """Why the C++ kernels cannot do a call, or None where they can."""
    missing = cpu_library.why_missing()
    if missing:
        return missing
    for t in tensors:
        if t.device.type not in ("cpu", "meta"):
            return f"the C++ kernels need tensors on the CPU, not on {t.device.type}"
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"the C++ kernels compute in float32, float16 and bfloat16, not in {t.dtype}"
    return None


def why_not_triton(op: str, *tensors: Tensor) -> str | None:
    """Why the Triton kernels cannot do a call, or None where they can."""
    if not _TRITON_INSTALLED:
        return "Triton is not installed"
    for t in tensors:
        kind = t.device.type
        if kind == "cuda":
            if torch.cuda.get_device_properties(t.device).major < 8 and not torch.version.hip:
                return "the Triton kernels need a GPU of compute capability 8.0 or newer"
        elif kind == "cpu" and _INTERPRETED:
            if t.dtype == torch.bfloat16:
                return "Triton's interpreter computes bfloat16 wrongly"
        elif kind != "meta":
            return f"the Triton kernels need a GPU, and the tensors are on {kind}"
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"the Triton kernels compute in float32, float16 and bfloat16, not in {t.dtype}"
    if op == "graph_mix":  # its products are as deep as a tile
        return None
    if tensors and tensors[0].dtype == torch.float32 and tensors[0].device.type != "cpu":
        widest = max(t.size(-1) for t in tensors)
        if widest > TRITON_FP32_WIDTH and (torch.version.hip or not tf32_allowed()):
            hint = "; torch.set_float32_matmul_precision('high') allows TF32, which has no such limit"
            return (
                f"fp32 products of {widest} columns do not fit the registers of the Triton kernels (they take "
                f"{TRITON_FP32_WIDTH}{'' if torch.version.hip else hint})"
            )
    if tensors and tensors[0].size(-1) > TRITON_WIDTH:
        return f"the query has {tensors[0].size(-1)} columns, and the Triton kernels take {TRITON_WIDTH} at most"
    return None


def explain(op: str, *tensors: object) -> str:
    """One sentence: which backend `glomo.<op>` runs on for these tensors, and why.

    Args:
        op: name of a public op, such as "relu2_attention".
        tensors: the tensors that the call would get (their device and dtype decide between compiled backends).

    Raises:
        ValueError: there is no such op, or the forced backend does not exist.
    """
    if op not in OPS:
        raise ValueError(f"There is no op {op!r}; the ops are {', '.join(OPS)}.")
    calls = [t for t in tensors if isinstance(t, Tensor)]
    forced = forced_backend()
    if forced:
        name, who = forced
        reason = why_not(name, op, *calls) if calls else None
        if reason:
            return f"{op} raises, because {who} forces {name!r}, but {reason}."
        return f"{op} runs on {name!r}, because {who} forces it."
    if not calls:
        here = ["cpu" if why_not_cpu(op) is None else "blocked", "triton" if why_not_triton(op) is None else "blocked"]
        if here[0] == here[1]:
            return f"{op} runs on {here[0]!r}, because {why_not_cpu(op)}, and {why_not_triton(op)}."
        return f"{op} runs on {here[0]!r} for tensors on the CPU, and on {here[1]!r} for tensors on a GPU."
    best = "triton" if calls[0].device.type == "cuda" else "cpu"
    reason = why_not(best, op, *calls)
    return f"{op} runs on 'blocked', because {reason}." if reason else f"{op} runs on {best!r}, {BACKENDS[best]}."
