"""Which implementation of an op runs: the automatic choice, and how to force one.

A backend is forced for a block of code by `use_backend("reference")` and for a process by the environment variable
GLOMO_BACKEND. A forced backend that cannot do a call raises; the automatic choice falls back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

BACKENDS = {
    "reference": "plain PyTorch, the definition; keeps whole T x S tensors",
    "blocked": "plain PyTorch over blocks of targets; memory linear in T",
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

_forced: str | None = None


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, but the backends are {', '.join(BACKENDS)}.")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the block on the named backend ("reference" or "blocked").

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


def select_backend() -> str:
    """The backend that the next call runs on."""
    forced = forced_backend()
    return forced[0] if forced else "blocked"


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
    forced = forced_backend()
    if forced:
        name, who = forced
        return f"{op} runs on {name!r}, because {who} forces it."
    where = " and ".join(sorted({t.device.type for t in tensors if hasattr(t, "device")})) or "any device"
    return f"{op} runs on 'blocked', because no compiled backend is installed for {where}."
