"""The C++ kernels beyond the parity tests that all backends share: every instruction set, threads, memory, strides."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import glomo
from glomo.kernels import cpu_library, use_backend
from parity import DEVICE, DTYPES, INTERPRETED, check_parity, far_apart, random, run

pytestmark = [
    pytest.mark.skipif(cpu_library.MISSING is not None, reason=f"no C++ kernels: {cpu_library.MISSING}"),
    pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="is about another backend"),
]
select = torch.ops.glomo_cpu.instruction_set if cpu_library.MISSING is None else lambda name: ""
SETS = [name for name in ("portable", "avx2", "avx512", "avx512_bf16") if select(name)]
select("")


@pytest.fixture(autouse=True)
def _forced():
    with use_backend("cpu"):
        yield


@pytest.fixture(params=SETS)
def instruction_set(request):
    select(request.param)
    yield request.param
    select(cpu_library.INSTRUCTION_SET)


CALLS = {
    "plain": (((2, 3, 70, 20), (2, 3, 130, 20), (2, 3, 130, 35)), {}),
    "strictly causal, bias per target": (
        ((2, 100, 64), (2, 100, 64), (2, 100, 64), (2, 100, 1)),
        dict(is_causal=True, diagonal=-1),
    ),
    "bias per source, grouped heads, dropout": (
        ((4, 65, 7), (2, 90, 7), (2, 90, 3), (4, 1, 90)),
        dict(enable_gqa=True, dropout_p=0.3),
    ),
    "whole bias for all heads, scale": (((3, 33, 16), (3, 129, 16), (3, 129, 80), (33, 129)), dict(scale=0.3)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_every_instruction_set_meets_the_reference(instruction_set, name, dtype):
    shapes, options = CALLS[name]
    mask = torch.rand(shapes[0][-2], shapes[1][-2]) > 0.3

    def call(query, key, value, bias=None):
        out, z = glomo.relu2_attention(query, key, value, bias, mask, return_normalizer=True, **options)
        return out, z * 1e-3

    check_parity(call, [random(*shape, dtype=dtype) for shape in shapes])


def everything(heads=2):
    """A call that uses all kernels, as (call, tensors)."""
    tensors = [random(heads, 150, 20), random(heads, 200, 20), random(heads, 200, 35), random(150, 1), random(1, 200)]

    def call(query, key, value, rows, columns):
        first = glomo.relu2_attention(query, key, value, rows, is_causal=True, diagonal=60, dropout_p=0.2)
        return first, glomo.relu2_attention(query, key, value, columns)

    return call, tensors


@pytest.mark.parametrize("heads", [1, 40])
def test_same_bits_on_any_number_of_threads(heads):
    """Few heads are cut into ranges of sources, whose sums must not depend on who computed them."""
    call, tensors = everything(heads)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(call, tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def strided_copies(t):
    """The same numbers at odd addresses, with rows far apart, with columns apart, and transposed."""
    odd = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    rows = torch.empty(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype)[..., : t.shape[-1]]
    columns = torch.empty(*t.shape, 2, dtype=t.dtype)[..., 0]
    turned = torch.empty(*t.shape[:-2], t.shape[-1], t.shape[-2], dtype=t.dtype).mT
    return [copy.copy_(t) for copy in (odd, rows, columns, turned)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_nothing(instruction_set, dtype):
    call, tensors = everything()
    tensors = [t.to(dtype) for t in tensors]
    expected = run(call, tensors)
    for copies in zip(*(strided_copies(t) for t in tensors), strict=True):
        for a, b in zip(expected, run(call, copies), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_beyond_32_bits(which, dim):
    tensors = [random(*shape, dtype=torch.bfloat16) for shape in ((7, 4), (35, 4), (35, 70), (7, 35))]
    expected = run(glomo.relu2_attention, tensors)
    tensors[which] = far_apart(tensors[which], dim)
    for a, b in zip(expected, run(glomo.relu2_attention, tensors), strict=True):
        assert torch.equal(a, b)


def test_nan_and_infinity_go_where_they_do_in_the_reference():
    query, key, value = random(1, 70, 8), random(1, 90, 8), random(1, 90, 5)
    query[0, 3, 2] = float("nan")
    value[0, 10, 1] = float("inf")
    key[0, 50, 0] = float("inf")
    found = glomo.relu2_attention(query, key, value, is_causal=True)
    with use_backend("reference"):
        expected = glomo.relu2_attention(query, key, value, is_causal=True)
    assert torch.equal(found.isnan()[0, :50], expected.isnan()[0, :50])
    assert found[0, 3].isnan().all()
    assert found[0, 69].isnan().all() == expected[0, 69].isnan().all()


def test_other_devices_and_dtypes_are_refused():
    query = random(2, 3, 4)
    with pytest.raises(ValueError, match=r"not in torch\.float64"):
        glomo.relu2_attention(*[query.double()] * 3)


def test_an_instruction_set_that_does_not_exist():
    result = subprocess.run(
        [sys.executable, "-m", "glomo", "info"],
        env={**os.environ, "GLOMO_CPU_ISA": "avx1024"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "GLOMO_CPU_ISA is 'avx1024', but must be portable, avx2, avx512 or avx512_bf16" in result.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_wide_instructions_are_where_they_belong():
    """Code that runs everywhere must not hold an instruction that only some CPUs have."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", str(cpu_library.FILE)], capture_output=True, text=True, check=True
    ).stdout
    functions = re.split(r"\n[0-9a-f]+ <(.*)>:\n", listing)[1:]
    widths = dict(portable=0, avx2=0, avx512=0, avx512_bf16=0)
    for name, body in zip(functions[::2], functions[1::2], strict=True):
        vectors = re.findall(r"%([yz])mm", body)
        if "avx512_bf16::" in name:
            widths["avx512_bf16"] += len(re.findall("vdpbf16ps", body))
        elif "avx512::" in name:
            widths["avx512"] += vectors.count("z")
            assert "vdpbf16ps" not in body, name
        elif "avx2::" in name:
            widths["avx2"] += vectors.count("y")
            assert "z" not in vectors, name
        else:
            assert not vectors, name
            widths["portable"] += len(re.findall(r"%xmm", body))
    assert min(widths[name] for name in SETS) > 100, widths
