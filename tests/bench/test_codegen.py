"""The machine code of a few kernels that stand for the others; `python -m bench.codegen` looks at all of them."""

import importlib.util
import os
from unittest import mock

import pytest
import torch

from bench import codegen
from glomo.kernels import configurations
from glomo.kernels.configurations import Configuration

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no machine code"),
]
CASE = codegen.Case("glomo", torch.bfloat16, 64, 64, codegen.CALLS["glomo: strictly causal, bias per target"])


KERNELS = {
    "glomo: strictly causal, bias per target": ("forward", "targets", "sources"),
    "softmax": ("forward", "targets", "sources"),
    "mix": ("mixed", "features", "moments"),
    "mix, each graph": ("graph_by_graph",),
}


@pytest.mark.parametrize(("name", "kernel"), [(name, kernel) for name, some in KERNELS.items() for kernel in some])
@pytest.mark.parametrize("architecture", ["90", "80"])
def test_kernels_compile_cleanly(architecture, name, kernel):
    case = CASE._replace(name=name, run=codegen.CALLS[name])
    found = codegen.launches(case, f"sm_{architecture}")
    launch = next(x for x in found if x.kernel.__name__ == f"{kernel}_kernel")
    report = codegen.examine(launch, architecture)
    assert report.problems == []
    assert report.tensor > 0
    if architecture == "90":
        assert report.copies > 0, "loads are not asynchronous"
    assert report.blocks >= 1


def test_the_gate_finds_spills_and_too_much_shared_memory():
    """Tiles that are too large for their threads, and a pipeline that is too deep."""
    case = CASE._replace(width=128, features=128)
    for tile, problem in (
        (Configuration(128, 128, 128, 4, 2), "spills"),
        (Configuration(128, 128, 128, 8, 4), "too much shared memory"),
    ):
        with mock.patch.object(configurations, "_entry", lambda *_, tile=tile: tile):
            launch = codegen.launches(case, "sm_90")[0]
        assert problem in codegen.examine(launch, "90").problems


def test_spills_are_counted_where_they_repeat():
    """Moves before and behind a loop happen once; without a loop in sight all count."""
    program = [(0, "STL [R1], R9"), (16, "LDL R8, [R1]"), (32, "@P0 BRA 0x10"), (48, "LDL R9, [R1]"), (64, "BRA 0x40")]
    assert codegen._in_loops(program, "LDL|STL") == 1
    assert codegen._in_loops([line for line in program if "@P0" not in line[1]], "LDL|STL") == 3


def test_the_gate_finds_missing_tensor_cores():
    launch = codegen.launches(CASE, "sm_90")[0]
    with mock.patch.object(
        codegen, "_examine_nvidia", return_value=codegen.Report(1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1, [])
    ):
        assert codegen.examine(launch, "90").problems == ["no tensor-core instruction"]


def test_fp32_needs_no_tensor_cores():
    launch = codegen.launches(CASE._replace(dtype=torch.float32), "sm_90")[0]
    with mock.patch.object(
        codegen, "_examine_nvidia", return_value=codegen.Report(1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1, [])
    ):
        assert codegen.examine(launch, "90").problems == []


def test_launches_are_those_of_a_call():
    """On "meta" tensors nothing runs, and every kernel of the two passes is seen once."""
    names = [launch.kernel.__name__ for launch in codegen.launches(CASE, "sm_90")]
    assert names == ["forward_kernel", "targets_kernel", "sources_kernel"]
