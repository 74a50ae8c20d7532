"""What the compiler makes of the Triton kernels, without a GPU: `python -m bench.codegen [--arch 80 90 100 gfx942]
[--quick]`.

Every launch of the ops on "meta" tensors is recorded and compiled for the architecture as a real launch would be, with
the shipped configuration. A row is printed for each; the command fails on register spills inside of a loop, a missing
tensor-core instruction, serialised wgmma, or more shared memory than the chip has.

The prediction is of the busiest loop: with T the tensor cores' clocks and C the clocks of each scheduler in one turn
(one an instruction, or eight an exponential if these take longer), a lone block of threads spends T + C on one tile,
and perfect overlap max(T, C). Both are given as TFLOP/s that count the tile's products once (a compiler may execute
more).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from glomo.kernels import configurations, triton_attention, triton_backward, triton_mixes, triton_mixture
from glomo.kernels.attention import triton as softmax_attention
from glomo.kernels.launch import Launch
from glomo.kernels.relu2_affinity import triton as affinity
from glomo.kernels.relu2_attention import triton as attention

SHARED_LIMIT = {"80": 166912, "86": 101376, "89": 101376, "90": 232448, "100": 232448, "gfx942": 65536}
NO_PRODUCTS = ("block_states_kernel", "tile_lists_kernel", "add_layer_kernel", "layer_gradient_kernel")
PEAK = 790.0
"""TFLOP/s of a bf16 matrix product measured on an H200, which the predictions are in units of."""


class Case(NamedTuple):
    name: str
    dtype: torch.dtype
    width: int
    features: int
    run: Callable[[Case], None]
    device: str = "meta"
    heads: int = 32
    size: int = 512  # targets, and sources

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Random numbers on a GPU, nothing on the device "meta"."""
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)


class Report(NamedTuple):
    registers: int
    spills: int  # instructions that move registers to memory and back
    spills_in_loops: int
    shared: int
    blocks: int  # of threads that fit a multiprocessor
    tensor: int  # tensor-core instructions
    copies: int  # asynchronous copies
    serialised: int
    loop: int  # clocks of a warp in the busiest loop
    tensor_clocks: float  # of one turn of it, for a whole block
    issue_clocks: float
    problems: list[str]


def bias_and_mask(case: Case, bias: str | None, mask: str | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    n, t = case.heads, case.size
    shapes = {"head": (n, 1, 1), "row": (n, t, 1), "column": (n, 1, t), "full": (n, t, t)}
    b = None if bias is None else case.tensor(*shapes[bias], dtype=torch.float32)
    return b, None if mask is None else case.tensor(*shapes[mask], dtype=torch.float32) > 0


def attend(
    case: Case, bias: str | None = None, mask: str | None = None, diagonal: int | None = None, dropout_p: float = 0.0
) -> None:
    """relu2_attention forward and backward."""
    shape = (case.heads, case.size)
    query, key, value = (
        case.tensor(*shape, case.width),
        case.tensor(*shape, case.width),
        case.tensor(*shape, case.features),
    )
    b, m = bias_and_mask(case, bias, mask)
    seed = torch.zeros((), dtype=torch.int64, device=case.device) if dropout_p else None
    arguments = (query, key, value, b, m, seed, dropout_p, diagonal, 1.0, 1e-6)
    outputs = attention.relu2_attention_forward(*arguments)
    gradients = [torch.empty_like(outputs[0]), torch.empty_like(outputs[1])]
    needs = [True, True, True, b is not None]
    attention.relu2_attention_backward(gradients, list(outputs), *arguments, needs=needs)


def attend_softmax(case: Case, mask: str | None = None, diagonal: int | None = None, dropout_p: float = 0.0) -> None:
    """attention forward and backward; mask "bool" is a padding mask, "float" has a number for every pair."""
    t = case.size
    query, key, value = (case.tensor(case.heads, t, d) for d in (case.width, case.width, case.features))
    m = None
    if mask is not None:
        m = case.tensor(case.heads, 1, t, dtype=torch.float32) > 0 if mask == "bool" else case.tensor(t, t)
    seed = torch.zeros((), dtype=torch.int64, device=case.device) if dropout_p else None
    arguments = (query, key, value, m, seed, dropout_p, diagonal, case.width**-0.5)
    outputs = softmax_attention.attention_forward(*arguments)
    gradients = [torch.empty_like(outputs[0]), torch.empty_like(outputs[1])]
    needs = [True, True, True, mask == "float"]
    softmax_attention.attention_backward(gradients, list(outputs), *arguments, needs=needs)


def packed(case: Case) -> tuple[torch.Tensor, ...]:
    """query, key, value and the boundaries of 16 sequences of equal length."""
    shape = (16 * case.size, max(case.heads // 16, 1))
    ends = torch.arange(17, dtype=torch.int32, device=case.device) * case.size
    return *(case.tensor(*shape, d) for d in (case.width, case.width, case.features)), ends, ends


def attend_softmax_packed(case: Case) -> None:
    """attention_varlen forward and backward."""
    arguments = (*packed(case), None, 0.0, 0, case.width**-0.5)
    outputs = softmax_attention.attention_varlen_forward(*arguments)
    gradients = [torch.empty_like(t) for t in outputs[:2]]
    softmax_attention.attention_varlen_backward(gradients, list(outputs), *arguments, needs=[True] * 3)


def attend_packed(case: Case) -> None:
    """relu2_attention_varlen forward and backward."""
    arguments = (*packed(case), None, None, 0.0, -1, 1.0, 1e-6)
    outputs = attention.relu2_attention_varlen_forward(*arguments)
    gradients = [torch.empty_like(t) for t in outputs]
    attention.relu2_attention_varlen_backward(gradients, list(outputs), *arguments, needs=[True] * 3 + [False])


def relate(case: Case, bias: str | None = "row", diagonal: int | None = -1) -> None:
    """relu2_affinity forward and backward."""
    query, key = case.tensor(case.heads, case.size, case.width), case.tensor(case.heads, case.size, case.width)
    b, _ = bias_and_mask(case, bias, None)
    outputs = affinity.relu2_affinity_forward(query, key, b, None, diagonal, 1.0, 1e-6)
    gradients = [torch.empty_like(t) for t in outputs]
    needs = [True, True, b is not None]
    affinity.relu2_affinity_backward(gradients, list(outputs), query, key, b, None, diagonal, 1.0, 1e-6, needs=needs)


def mix(
    case: Case,
    bias: str | None = None,
    mask: str | None = None,
    diagonal: int | None = None,
    chains: bool = False,
    mixtures: int = 1,
    sums_first: bool = True,
    given: bool = False,
    per_target: bool = False,
) -> None:
    """graph_mix of given graphs, or relu2_graph_mix, forward and backward: 4 layers of 8 heads."""
    n, t, batch = 32, case.size, max(case.heads // 32, 1)
    graphs = case.tensor(batch, n, t, t) if given else None
    query, key = (None if given else case.tensor(batch, n, t, case.width) for _ in range(2))
    b, m = bias_and_mask(case._replace(heads=n), bias, mask)
    weights = case.tensor(mixtures, batch, t if per_target else 1, n, dtype=torch.float32)
    arguments = (graphs, query, key, case.tensor(batch, t, case.features), weights, weights if chains else None, b)
    arguments = (*arguments, None if m is None else m[:1], (8, diagonal, 1.0, 1e-6))
    with mock.patch.object(triton_mixture, "sums_first", return_value=sums_first):
        out, inverse = triton_mixes.forward(*arguments)
    needs = [given, not given, not given, True, True, chains, b is not None]
    triton_mixes.backward(torch.empty_like(out), None if given else inverse, *arguments, needs)


CALLS: dict[str, Callable[[Case], None]] = {
    "plain": attend,
    "glomo: strictly causal, bias per target": lambda c: attend(c, bias="row", diagonal=-1),
    "packed": attend_packed,
    "affinity": relate,
    "bias per source, padding mask": lambda c: attend(c, bias="column", mask="column"),
    "full bias": lambda c: attend(c, bias="full", diagonal=-1),
    "dropout": lambda c: attend(c, dropout_p=0.1, diagonal=0),
    "skipping tiles": lambda c: attend(c._replace(size=2048), bias="head"),
    "softmax": attend_softmax,
    "softmax, causal": lambda c: attend_softmax(c, diagonal=0),
    "softmax, packed": attend_softmax_packed,
    "softmax, padding mask": lambda c: attend_softmax(c, mask="bool"),
    "softmax, float mask": lambda c: attend_softmax(c, mask="float"),
    "softmax, dropout": lambda c: attend_softmax(c, dropout_p=0.1, diagonal=0),
    "mix": mix,
    "mix, glomo": lambda c: mix(c, bias="row", diagonal=-1, chains=True, mixtures=2, per_target=True),
    "mix, each graph": lambda c: mix(c, bias="row", diagonal=-1, sums_first=False),
    "mix, full bias, mask": lambda c: mix(c, bias="full", mask="column", per_target=True),
    "mix of given graphs": lambda c: mix(c, given=True, chains=True),
}


def with_tf32(run: Callable[[Case], None]) -> Callable[[Case], None]:
    def call(case: Case) -> None:
        torch.set_float32_matmul_precision("high")
        try:
            run(case)
        finally:
            torch.set_float32_matmul_precision("highest")

    return call


def cases(quick: bool, architecture: str) -> Iterator[Case]:
    if quick:
        for name in [*list(CALLS)[:2], "softmax", "mix, glomo"]:
            yield Case(name, torch.bfloat16, 64, 64, CALLS[name])
        return
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # wider fp32 goes to another backend (glomo.kernels.backend.TRITON_FP32_WIDTH)
        for width in (64,) if dtype == torch.float32 else (64, 128, 256):
            for name, run in CALLS.items():
                yield Case(name, dtype, width, width, run)
        for width, features in [(32, 32)] if dtype == torch.float32 else [(32, 32), (64, 300), (64, 1024)]:
            yield Case("plain", dtype, width, features, attend)
        if dtype != torch.float32:  # rows that cannot be copied in words of 16 bytes
            for width in (60, 100):
                yield Case("softmax, causal", dtype, width, width, CALLS["softmax, causal"])
                yield Case("full bias", dtype, width, width, CALLS["full bias"])
        if dtype != torch.float32:  # a graph's queries with a model's features
            for name in CALLS:
                if name.startswith("mix") or name == "glomo: strictly causal, bias per target":
                    yield Case(name, dtype, 64, 304, CALLS[name])
    for width in (64,) if architecture.startswith("gfx") else (64, 128, 256):
        names = ["plain", "glomo: strictly causal, bias per target", "full bias", "dropout", "affinity"]
        for name in [*names, "softmax", "softmax, float mask", "mix, glomo", "mix, full bias, mask"]:
            yield Case(f"tf32, {name}", torch.float32, width, width, with_tf32(CALLS[name]))


def launches(case: Case, architecture: str) -> list[Launch]:
    """What the case launches on a GPU of that architecture. On "meta" tensors nothing runs."""
    found: list[Launch] = []
    run = Launch.run
    for memory in (triton_attention._PLANS, triton_backward._CALLS):  # of other architectures and configurations
        memory.clear()

    def record(launch: Launch) -> None:
        found.append(launch)
        if case.device != "meta":
            run(launch)

    with (
        mock.patch.object(Launch, "run", record),
        mock.patch.object(configurations, "architecture", return_value=architecture),
    ):
        case.run(case)
    return found


def table_name(architecture: str) -> str:
    """The name of an architecture's file of tile shapes."""
    return architecture if architecture.startswith("gfx") else f"sm_{architecture}"


class Offline:
    """In the place of Triton's driver: kernels compile for the architecture, and nothing can be launched."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_current_device(self) -> str:
        """Triton remembers compiled kernels by it."""
        return self.architecture

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self.architecture.startswith("gfx"):
            return GPUTarget("hip", self.architecture, 64)
        return GPUTarget("cuda", int(self.architecture), 32)


def compile_launch(launch: Launch, architecture: str) -> Any:
    """What a launch would compile, by Triton's own look at its arguments: the one is in the other's disk cache."""
    from triton.runtime import driver

    options = {k: v for k, v in launch.options.items() if not (architecture.startswith("gfx") and k == "maxnreg")}
    with mock.patch.object(driver, "_active", Offline(architecture)):
        return launch.kernel.warmup(grid=(1,), **launch.arguments, **launch.constants, **options)


def examine(launch: Launch, architecture: str) -> Report:
    compiled = compile_launch(launch, architecture)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if architecture.startswith("gfx"):
        report = _examine_amd(compiled.asm["amdgcn"], shared)
    else:
        report = _examine_nvidia(compiled, architecture, warps, shared)
    problems = report.problems
    multiplies = launch.kernel.__name__ not in NO_PRODUCTS
    if multiplies and not report.tensor and not _is_full_fp32(launch):
        problems.append("no tensor-core instruction")
    if report.spills_in_loops > (24 if _is_full_fp32(launch) else 0):  # once before and behind a loop, they cost little
        problems.append("spills")
    if report.serialised:
        problems.append("serialised wgmma")
    if not report.blocks:
        problems.append("more registers than a multiprocessor has")
    if shared > SHARED_LIMIT.get(architecture, 65536):
        problems.append("too much shared memory")
    return report


def _is_full_fp32(launch: Launch) -> bool:
    """Products that no tensor core takes: held to less, for they are slow by nature."""
    dtype = next(iter(launch.arguments.values())).pointer.dtype
    return dtype == torch.float32 and launch.constants.get("PRECISION") == "ieee"


def _examine_nvidia(compiled: Any, architecture: str, warps: int, shared: int) -> Report:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        sass = _output(knobs.nvidia.cuobjdump.path, "-sass", str(cubin))
        log = ""
        if "wgmma.mma_async" in compiled.asm["ptx"]:  # the assembler alone says whether it serialised them
            log = _output(knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", f"{folder}/again")
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    count = lambda pattern: sum(bool(re.search(rf"\b(?:{pattern})\b", text)) for _, text in lines)
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    per_thread = (registers + 7) // 8 * 8
    blocks = min(65536 // (per_thread * 32 * warps), 233472 // (shared + 1024), 2048 // (32 * warps))
    program = [(int(address, 16), text) for address, text in lines]
    loop, tensor_clocks = _busiest_loop(program)
    serialised = len(re.findall(r"C75(?:0[0-9]|1[0-6])\b", log))
    return Report(
        registers,
        count("LDL|STL"),
        _in_loops(program, "LDL|STL"),
        shared,
        blocks,
        count("HGMMA|UTCHMMA|UTCQMMA|UTCOMMA|HMMA|UTC[A-Z]*MMA"),
        count("LDGSTS|UTMALDG"),
        serialised,
        loop,
        tensor_clocks * max(warps // 4, 1),
        loop * warps / 4,
        [],
    )


def _jumps_back(lines: list[tuple[int, str]]) -> Iterator[tuple[int, int, int]]:
    """(index of the jump, its address, its target) of every loop's end."""
    for i, (address, text) in enumerate(lines):
        jump = re.search(r"\bBRA(?:\.U)? .*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:  # a jump to itself is the end of a program
            yield i, address, int(jump[1], 16)


def _in_loops(lines: list[tuple[int, str]], pattern: str) -> int:
    loops = [(start, end) for _, end, start in _jumps_back(lines)] or [(0, lines[-1][0])]
    found = (address for address, text in lines if re.search(rf"\b(?:{pattern})\b", text))
    return sum(any(start <= address <= end for start, end in loops) for address in found)


def _busiest_loop(lines: list[tuple[int, str]]) -> tuple[int, float]:
    """(clocks of a warp, tensor-core clocks of one warpgroup) of the innermost loop with the most tensor-core work."""
    best, exponentials = (0, 0.0), 0
    for i, _, start in _jumps_back(lines):
        body = [t for a, t in lines[: i + 1] if a >= start]
        if any(re.search(r"\bBRA(?:\.U)? .*?0x([0-9a-f]+)", t) for t in body[:-1] if "HGMMA" in t):
            continue
        clocks = sum(
            int(m[1]) * int(m[2]) * int(m[3]) * 2 / 4096 for t in body if (m := re.search(r"MMA\.(\d+)x(\d+)x(\d+)", t))
        )
        if clocks and (not best[1] or len(body) < best[0]):
            best = (len(body), clocks)
            exponentials = sum("MUFU.EX2" in t for t in body)
    return max(best[0], 8 * exponentials), best[1]


def _examine_amd(assembly: str, shared: int) -> Report:
    number = lambda key: int((re.search(rf"\.{key}:\s*(\d+)", assembly) or ["", "0"])[1])
    # the assembler's own counts include moves to accumulation registers and to lanes of vector registers
    spills = len(re.findall(r"\bscratch_(?:load|store)", assembly))
    tensor = len(re.findall(r"\bv_mfma_", assembly))
    return Report(number("vgpr_count"), spills, spills, shared, 1, tensor, 0, 0, 0, 0.0, 0.0, [])


def _output(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100", "gfx942"])
    parser.add_argument("--quick", action="store_true", help="a few kernels that stand for the others")
    arguments = parser.parse_args()
    import triton

    print(
        f"Triton {triton.__version__}. T, C: clocks of tensor cores and schedulers in one turn of the main loop; "
        f"TFLOP/s without and with perfect overlap, of {PEAK:.0f} (an H200)"
    )
    bad = 0
    for architecture in arguments.arch:
        seen = set()
        for case in cases(arguments.quick, architecture):
            name = table_name(architecture)
            for launch in launches(case, name):
                try:
                    key = compile_launch(launch, architecture).hash
                    if key in seen:
                        continue
                    seen.add(key)
                    r = examine(launch, architecture)
                except Exception as error:
                    while error.__cause__:
                        error = error.__cause__  # type: ignore[assignment]
                    bad += 1
                    print(
                        f"FAIL {name} {launch.kernel.__name__} {case[:4]}: {type(error).__name__}: {str(error)[:400]}"
                    )
                    continue
                bad += bool(r.problems)
                print(line(name, case, launch, r), flush=True)
    print(f"{bad} problems")
    return 1 if bad else 0


def line(name: str, case: Case, launch: Launch, r: Report) -> str:
    c = launch.configuration
    tile = f"{c.M}x{c.N}" if c.M else "-"
    spills = f"{r.spills:3} spill" + (f" ({r.spills_in_loops} in loops)" if r.spills else "")
    text = (
        f"{name:7} {launch.kernel.__name__.removesuffix('_kernel'):12} "
        f"{str(case.dtype)[6:]:8} {case.width:3}/{case.features:<4} "
        f"{tile:8} w{c.warps} s{c.stages} {r.registers:3} reg {spills} {r.shared // 1024:3} KiB "
        f"{r.blocks} blocks {r.tensor:3} mma {r.copies:3} async"
    )
    if r.tensor_clocks and launch.constants.get("FEATURES", 0) <= launch.constants.get("F", 0):
        useful = PEAK * 2 * c.M * c.N * products(launch) / 4096
        worst, best = r.tensor_clocks + r.issue_clocks, max(r.tensor_clocks, r.issue_clocks)
        text += f"  T {r.tensor_clocks:4.0f} C {r.issue_clocks:4.0f}: {useful / worst:3.0f} - {useful / best:3.0f}"
    return text + f"  {case.name}" + (f"  ** {', '.join(r.problems)}" if r.problems else "")


def products(launch: Launch) -> int:
    """Columns of the matrix products of one tile, added up."""
    E, F = launch.constants["E"], launch.constants.get("F", 0)
    names = {"forward_kernel": E + F, "targets_kernel": 2 * E + F, "pairs_kernel": E + F, "affinity_kernel": E}
    names |= dict.fromkeys(("mixed_kernel", "features_kernel", "moments_kernel"), E)  # the loop over the graphs
    names["graph_by_graph_kernel"] = E + F
    return names.get(launch.kernel.__name__, 2 * E + 2 * F)


if __name__ == "__main__":
    sys.exit(main())
