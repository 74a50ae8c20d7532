"""The oracle of every op: the reference backend in fp64.

An op meets it if, for the output and every gradient,

    max|ours - ref64| <= 2 * max(eager, sensitivity) + rounding

where the fp64 run starts from the same (rounded) inputs, eager is the error of the reference in the op's own dtype, and
sensitivity is how far the fp64 result moves when inputs, cotangents and every intermediate result move by one fp32
rounding (Monte Carlo arithmetic): near a dead row the gradient of the normalised square is so steep, and a gradient
summed over everything is so small against its terms, that two orders of summation differ by more than a factor.
rounding is one of the result's largest value in its dtype, and a few in fp32 of the largest value of all results:
gradients that cancel to nothing still carry their terms' roundings.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glomo.kernels import cpu_library, use_backend
from glomo.kernels.backend import forced_backend

DEVICE = os.environ.get("GLOMO_TEST_DEVICE", "cpu")
"""PyTorch's default device in the tests: with GLOMO_TEST_DEVICE=cuda the same tests run on a GPU."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
"""What every op computes in; Triton's interpreter gets bf16 wrong."""
IMPLEMENTATIONS = ["reference", "blocked"]
"""The backends that run here."""
if INTERPRETED or DEVICE != "cpu":
    IMPLEMENTATIONS.append("triton")
elif cpu_library.MISSING is None:
    IMPLEMENTATIONS.append("cpu")
needs_triton = pytest.mark.skipif(
    "triton" not in IMPLEMENTATIONS, reason="needs a GPU (GLOMO_TEST_DEVICE=cuda) or TRITON_INTERPRET=1"
)
EXAMPLES = 60 if IMPLEMENTATIONS[-1] != "triton" else 25
PHASES = tuple(p for p in Phase if EXAMPLES == 60 or p not in (Phase.shrink, Phase.explain))
"""Every Triton kernel takes seconds, to interpret or to compile: fewer examples, and no search for smaller failures."""

Call = Callable[..., Any]
_NUDGES = torch.Generator("cpu").manual_seed(1)


def run(call: Call, tensors: Sequence[Tensor | None], backend: str | None = None, nudge: bool = False) -> list[Tensor]:
    """Outputs of call(*tensors), then the gradients of a fixed random functional of them with respect to every
    floating input. The default generator is seeded first, so that dropout draws the same seed each time."""
    move = nudged if nudge else torch.detach
    inputs = [None if t is None else move(t).detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    torch.manual_seed(11)
    rounded = RoundedArithmetic() if nudge else contextlib.nullcontext()
    with use_backend(backend) if backend else contextlib.nullcontext(), rounded:
        outputs = call(*inputs)
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        generator = torch.Generator("cpu").manual_seed(5)
        cotangents = [
            torch.randn(o.shape, generator=generator, device="cpu").bfloat16().to(o.device, o.dtype) for o in outputs
        ]
        cotangents = [move(c) for c in cotangents]
        gradients = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True)]
    return [o.detach() for o in outputs] + zeros


def check_parity(
    call: Call,
    tensors: Sequence[Tensor | None],
    moving: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Holds the forced backend, or else the automatic choice and "blocked", to the fp64 reference on these inputs.

    The runs that show the sensitivity are inside of `moving()`, where an op has leave to round more than that.
    """
    wide = [None if t is None else t.double() if t.is_floating_point() else t for t in tensors]
    expected = run(call, wide, "reference")
    eager = run(call, tensors, "reference")
    _NUDGES.manual_seed(1)  # the budget does not depend on the tests before
    with moving():
        moved = [run(call, wide, "reference", nudge=True) for _ in range(4)]
    largest = max(float(t[t.isfinite()].abs().max()) if t.isfinite().any() else 0.0 for t in expected)
    for backend in [None] if forced_backend() or IMPLEMENTATIONS[-1] != "cpu" else [None, "blocked"]:
        check_results(run(call, tensors, backend), eager, expected, moved, largest)


def check_results(
    ours: list[Tensor], eager: list[Tensor], expected: list[Tensor], moved: list[list[Tensor]], largest: float
) -> None:
    for i, (mine, plain, truth, *near) in enumerate(zip(ours, eager, expected, *moved, strict=True)):
        assert mine.shape == truth.shape, f"result {i}: shape {tuple(mine.shape)}, expected {tuple(truth.shape)}"
        assert mine.dtype == plain.dtype, f"result {i}: {mine.dtype}, expected {plain.dtype}"
        finite = truth.isfinite()
        assert torch.equal(mine.isfinite(), finite), f"result {i}: NaN or Inf in other places than the reference"
        truth = truth[finite]
        if truth.numel() == 0:
            continue
        error = (mine[finite].double() - truth).abs().max().item()
        rounding = torch.finfo(mine.dtype).eps * truth.abs().max().item() + 4 * torch.finfo(torch.float32).eps * largest
        budget = 2 * max((t[finite].double() - truth).abs().max().item() for t in (plain, *near)) + rounding
        assert error <= budget, f"result {i}: error {error:.3e} is more than the budget {budget:.3e}"


def widest(backend: str) -> torch.dtype:
    """fp64 where the backend has it."""
    return torch.float32 if backend in ("cpu", "triton") else torch.float64


class RoundedArithmetic(TorchDispatchMode):
    """Moves the result of every product and sum by one fp32 rounding, forward and backward."""

    ARITHMETIC = ("bmm", "mm", "mul", "div", "add", "sub", "sum", "pow")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return nudged(result) if func.overloadpacket.__name__ in self.ARITHMETIC else result


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
        return result


def nudged(t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every value one rounding up or down."""
    if not t.is_floating_point():
        return t
    signs = torch.randint(0, 2, t.shape, generator=_NUDGES, device="cpu").to(t.device) * 2 - 1
    return t * (1 + torch.finfo(dtype).eps * signs)


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def strided(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values in a view with a step, an offset and permuted strides."""
    reordered = (*shape[:-3], shape[-2], shape[-3], shape[-1]) if len(shape) > 2 else shape
    base = random(*reordered[:-1], 2 * shape[-1] + 1, dtype=dtype)[..., 1::2]
    return base.transpose(-3, -2) if len(shape) > 2 else base


def far_apart(t: Tensor, dim: int) -> Tensor:
    """The same numbers, but the last seventh of a dimension begins 2^31 elements behind its first ones."""
    step = 2**31 // (t.size(dim) * 6 // 7) + 1
    strides = [1] * t.dim()
    strides[dim] = step
    storage = torch.empty(step * (t.size(dim) - 1) + max(t.shape), dtype=t.dtype)  # few of its pages are ever touched
    return storage.as_strided(t.shape, strides).copy_(t)
