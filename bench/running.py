"""The case at hand: its tensors, what it should give, and of each peer whether it can do it."""

from __future__ import annotations

import gc
import re
import time
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from bench import measure
from bench.cases import Case
from bench.peers import PEERS, WHOLE_GRAPHS, YARDSTICKS, around
from bench.problems import Call, Problem, make
from glomo.kernels import explain

# share of the root mean square by which 99 of 100 values may be off: a check that a peer computes the same thing
TOLERANCE = {"fp32": 0.01, "bf16": 0.1, "fp16": 0.05}


@dataclass
class Measured:
    """A peer on the case: its work, or the reason why it cannot do it."""

    work: measure.Work | None = None
    reason: str = ""
    backend: str = ""
    memory: int | None = None
    estimate: float = 0.0
    """Seconds of a call, once warm."""
    seconds: list[float] = field(default_factory=list)


class Running:
    """One case, alive until the next one begins."""

    def __init__(self, case: Case, device: str) -> None:
        gc.collect()
        torch._dynamo.reset()  # what was compiled for other shapes would only cost checks and memory
        if device != "cpu":
            torch.cuda.empty_cache()
        self.case, self.device, self.began = case, device, time.time()
        self.peers: dict[str, Measured] = {}
        self.bytes = 0
        self._problem: Problem | None = None
        self._expected: list[Tensor] = []
        self._cotangent: Tensor | None = None

    def prepare(self, peer: str) -> Measured:
        """The peer, checked and warm, or with its reason. The same object for the same peer."""
        if peer not in self.peers:
            self.peers[peer] = measured = Measured()
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                try:
                    problem = self._checked_problem()
                    with around(peer):
                        self._prepare(problem, peer, measured)
                except Exception as error:  # any way in which a peer can fail is a result, not the end of the run
                    measured.work, measured.reason = None, _sentence(error, [str(n.message) for n in notes])
                    if self.device != "cpu":
                        _go_on_or_exit(f"{self.case.id}: {peer}: {measured.reason}")
        return self.peers[peer]

    def _checked_problem(self) -> Problem:
        """The problem, once ours has done it: without that no peer can be checked."""
        if self._problem is None:
            problem = make(self.case, self.device)
            self._expected = self._results(problem, problem.call)
            # every input and output moved once; in the backward pass their gradients too
            moved = [*problem.tensors, self._expected[0]]
            self.bytes = sum(t.numel() * t.element_size() for t in moved) * (1 + self.case.backward)
            self._problem = problem
        return self._problem

    def _prepare(self, problem: Problem, peer: str, measured: Measured) -> None:
        self._refuse_without_room(peer)
        call = PEERS[self.case.op][peer](problem)
        found = self._results(problem, call)
        if peer not in YARDSTICKS.get(self.case.op, ()):
            wrong = disagreement(found, self._expected, TOLERANCE[self.case.dtype])
            if wrong:
                raise ValueError(wrong)
        del found

        def work() -> None:
            self._results(problem, call)

        measured.backend = _backend(self.case.op, problem.tensors) if peer in ("glomo", "eager") else ""
        start = time.perf_counter()
        measured.memory = measure.peak_memory(work, self.device)
        measured.estimate = time.perf_counter() - start
        measured.work = work

    def _results(self, problem: Problem, call: Call) -> list[Tensor]:
        """The output, and in the backward pass a gradient for every wanted tensor."""
        out = call(*problem.tensors)
        if not self.case.backward:
            return [out.detach()]
        if self._cotangent is None:  # not ones: the rows of a graph sum to 1, their gradient would be rounding alone
            self._cotangent = torch.randn_like(out) if out.dim() else torch.ones_like(out)
        grads = torch.autograd.grad(out, problem.wanted, self._cotangent, materialize_grads=True, allow_unused=True)
        return [out.detach(), *grads]

    def _refuse_without_room(self, peer: str) -> None:
        """A CPU without memory kills the process instead of raising, so that is foreseen."""
        if self.device != "cpu" or peer not in WHOLE_GRAPHS:
            return
        needed = self.case.graphs * self.case.length**2 * 4 * (3 + 3 * self.case.backward)
        free = measure.free_memory()
        if needed > 0.8 * free:
            raise MemoryError(f"holds whole T x S tensors, about {needed / 1e9:.0f} GB; {free / 1e9:.0f} GB are free")


def disagreement(found: list[Tensor], expected: list[Tensor], tolerance: float) -> str:
    """Empty, or a sentence saying which result is not what it should be."""
    sizes = [t.float().square().mean().sqrt() for t in expected]
    for i, (got, want, size) in enumerate(zip(found, expected, sizes, strict=True)):
        name = f"gradient {i}" if i else "the output"
        if got.shape != want.shape:
            return f"wrong: {name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
        if not got.isfinite().all():
            return f"wrong: NaN or Inf in {name}"
        # a gradient that cancels to nothing still carries the roundings of its terms
        budget = tolerance * torch.maximum(size, 1e-3 * max(sizes))
        off = ((got.float() - want.float()).abs() > budget).float().mean().item()
        if off > 0.01:
            return f"wrong: {100 * off:.0f} % of {name} are off by more than {tolerance} of its root mean square"
    return ""


def _go_on_or_exit(what: str) -> None:
    """After some errors a process gets no answer from the GPU any more, and all that follows would look wrong."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        pytest.exit(f"The GPU is lost to this process after {what} (leave it out with -k, then go on)", returncode=3)


def _backend(op: str, tensors: list[Tensor]) -> str:
    """The name of the backend that the op picks for these tensors, cu_seqlens aside."""
    floating = [t for t in tensors if t.is_floating_point()]
    found = re.search(r"runs on '(\w+)'", explain("relu2_attention" if op == "pretrain_step" else op, *floating))
    return found[1] if found else ""


def _sentence(error: Exception, notes: list[str]) -> str:
    """One line for a table. SDPA says why a kernel was refused in warnings before it raises."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    asides = ("not used because", "disabled")  # headings, and the backends that were not asked for
    why = [n for n in notes if "Triggered internally" in n and not any(a in n for a in asides)]
    lines = [line.strip() for line in (why[0] if why else str(error)).splitlines() if line.strip()]
    sentence = (lines or [type(error).__name__])[0].split(" (Triggered internally")[0].split(". ")[0]
    return sentence.replace("|", "/").rstrip(".")[:100]
