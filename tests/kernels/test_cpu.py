"""The C++ kernels beyond the parity tests that all backends share: every instruction set, threads, memory, strides."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from unittest import mock

import pytest
import torch

import glomo
from glomo.kernels import cpu_library, use_backend
from parity import DEVICE, DTYPES, INTERPRETED, check_parity, far_apart, random, run

pytestmark = [
    pytest.mark.skipif(
        cpu_library.MISSING is not None and not shutil.which("g++"), reason=f"no C++ kernels: {cpu_library.MISSING}"
    ),
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


def relu2(query, key, value, bias=None, **options):
    mask = torch.arange(query.size(-2) * key.size(-2)).view(query.size(-2), key.size(-2)) % 7 > 1
    out, z = glomo.relu2_attention(query, key, value, bias, mask, return_normalizer=True, **options)
    return out, z * 1e-3


def attention(query, key, value, mask=None, **options):
    out, lse = glomo.attention(query, key, value, mask, return_lse=True, **options)
    return out, lse.masked_fill(lse == -torch.inf, 0)


def mix(matrices, query, key, features, bias, weights, chains):
    with mock.patch("glomo.kernels.cpu_mixes.as_matrices", return_value=matrices):
        both = (weights, weights.flip(-1)), (chains, chains.flip(-1))
        return glomo.relu2_graph_mix(query, key, features, *both, bias, num_heads=2, is_causal=True, diagonal=1)


STRICT = dict(is_causal=True, diagonal=-1)
PACKED = torch.tensor([0, 70, 70, 75])
CALLS = {
    "relu2": (relu2, [(2, 3, 70, 20), (2, 3, 130, 20), (2, 3, 130, 35)]),
    "relu2, strictly causal, bias per target": (partial(relu2, **STRICT), [(2, 100, 64)] * 3 + [(2, 100, 1)]),
    "relu2, bias per source, grouped heads, dropout": (
        partial(relu2, enable_gqa=True, dropout_p=0.3),
        [(4, 65, 7), (2, 90, 7), (2, 90, 3), (4, 1, 90)],
    ),
    "relu2, whole bias for all heads, scale": (
        partial(relu2, scale=0.3),
        [(3, 33, 16), (3, 129, 16), (3, 129, 80), (33, 129)],
    ),
    "attention, causal": (partial(attention, is_causal=True), [(2, 3, 70, 20), (2, 3, 130, 20), (2, 3, 130, 35)]),
    "attention, dropout, large scores": (
        partial(attention, dropout_p=0.3, scale=4.0, enable_gqa=True),
        [(4, 65, 32), (2, 90, 32), (2, 90, 3)],
    ),
    "attention, float mask": (attention, [(2, 3, 70, 16), (2, 3, 90, 16), (2, 3, 90, 16), (3, 70, 90)]),
    "attention, packed": (
        lambda q, k, v: glomo.attention_varlen(q, k, v, PACKED, PACKED, 70, 70),
        [(75, 2, 16), (75, 2, 16), (75, 2, 40)],
    ),
    "affinity": (glomo.relu2_affinity, [(2, 70, 20), (2, 130, 20), (2, 1, 130)]),
    "affinity, strictly causal": (partial(glomo.relu2_affinity, **STRICT), [(2, 130, 20), (2, 130, 20), (130, 130)]),
    "mix": (
        lambda q, k, f, w, b: glomo.relu2_graph_mix(q, k, f, w, None, b, **STRICT),
        [(2, 5, 70, 12), (2, 5, 130, 12), (2, 130, 20), (2, 70, 5), (5, 1, 1)],
    ),
    "chains as matrices": (
        partial(mix, True),
        [(2, 6, 100, 12), (6, 100, 12), (2, 100, 20), (6, 100, 1), (2, 6), (2, 100, 6)],
    ),
    "chains times features": (
        partial(mix, False),
        [(2, 6, 100, 12), (6, 100, 12), (2, 100, 20), (6, 100, 100), (2, 6), (2, 100, 6)],
    ),
    "given graphs": (partial(glomo.graph_mix, num_heads=2), [(2, 4, 70, 70), (70, 33), (4,), (2, 70, 4)]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_every_instruction_set_meets_the_reference(instruction_set, name, dtype):
    call, shapes = CALLS[name]
    check_parity(call, [random(*shape, dtype=dtype) for shape in shapes])


def everything(heads=2):
    """A call that uses all kernels, as (call, tensors)."""
    shapes = [(heads, 150, 20), (heads, 200, 20), (heads, 200, 35), (150, 1), (1, 200), (150, 200), (heads,)]

    def call(query, key, value, rows, columns, pairs, weights):
        yield glomo.relu2_attention(query, key, value, rows, is_causal=True, diagonal=60, dropout_p=0.2)
        yield glomo.relu2_attention(query, key, value, columns)
        yield glomo.attention(query, key, value, pairs)
        yield glomo.relu2_affinity(query, key, columns)
        yield glomo.relu2_graph_mix(query, key, value[0], weights, None, pairs)
        square = query, key[:, :150], value[0, :150], weights, weights
        for matrices in (True, False):
            with mock.patch("glomo.kernels.cpu_mixes.as_matrices", return_value=matrices):
                yield glomo.relu2_graph_mix(*square, rows, num_heads=max(heads // 2, 1), is_causal=True)
        yield glomo.graph_mix(pairs.expand(heads, -1, -1), value[0], weights)

    return lambda *tensors: list(call(*tensors)), [random(*shape) for shape in shapes]


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
    copies = [strided_copies(t) if t.dim() > 1 else [t] * 4 for t in tensors]
    for inputs in zip(*copies, strict=True):
        for a, b in zip(expected, run(call, inputs), strict=True):
            largest = float(a.abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=(1e-5 if dtype == torch.float32 else 2e-2) * largest)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_beyond_32_bits(which, dim):
    tensors = [random(*shape, dtype=torch.bfloat16) for shape in ((7, 4), (35, 4), (35, 70), (7, 35))]

    def call(query, key, value, bias):
        yield glomo.relu2_attention(query, key, value, bias)
        yield glomo.attention(query, key, value, bias)
        yield glomo.relu2_affinity(query, key, bias)
        yield glomo.relu2_graph_mix(query[None], key[None], value, torch.ones(1), None, bias)
        yield glomo.graph_mix(bias[None], value, torch.ones(1))

    listed = lambda *inputs: list(call(*inputs))
    expected = run(listed, tensors)
    tensors[which] = far_apart(tensors[which], dim)
    for a, b in zip(expected, run(listed, tensors), strict=True):
        assert torch.equal(a, b)


SIZES = dict(batch=2, targets=5, sources=7, columns=3, features=4)


@pytest.mark.parametrize("empty", SIZES)
def test_empty_sizes(empty):
    b, t, s, e, f = {**SIZES, empty: 0}.values()

    def call(query, key, value, features, weights):
        yield glomo.relu2_attention(query, key, value, 0.5)
        yield glomo.attention(query, key, value, scale=1.0)
        yield glomo.relu2_affinity(query, key, 0.5)
        yield glomo.relu2_graph_mix(query, key, value[:, 0], weights, None, 0.5)
        yield glomo.relu2_graph_mix(query, query, features, weights, weights, 0.5)

    shapes = (b, 2, t, e), (b, 2, s, e), (b, 2, s, f), (b, t, f), (2,)
    check_parity(lambda *inputs: list(call(*inputs)), [random(*shape) for shape in shapes])


def test_sums_whose_inverse_overflows():
    query, key = torch.full((2, 70, 1), 1e-20), torch.ones(2, 70, 1)
    expected = torch.full((2, 70, 70), 1 / 70)
    torch.testing.assert_close(glomo.relu2_affinity(query, key, eps=0), expected, rtol=1e-3, atol=0)
    value = torch.ones(2, 70, 3)
    torch.testing.assert_close(glomo.relu2_attention(query, key, value, eps=0), value, rtol=1e-3, atol=0)


def test_memory_is_linear():
    """A T x S tensor would be 1 GB."""
    code = """
import resource, torch, glomo
torch.set_num_threads(2)
tensors = [torch.randn(1, 16384, 16, requires_grad=True) for _ in range(3)]
def megabytes(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.autograd.grad(call(*tensors).sum(), tensors)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
one = torch.ones(1)
print(megabytes(lambda q, k, v: glomo.relu2_attention(q, k, v, is_causal=True)))
print(megabytes(lambda q, k, v: glomo.attention(q, k, v, is_causal=True)))
print(megabytes(lambda q, k, v: glomo.relu2_graph_mix(q, k, v[0], one, one, is_causal=True)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert max(map(float, result.stdout.split())) < 150, result.stdout


@pytest.mark.parametrize(
    "op",
    [
        lambda q, k, v: glomo.relu2_attention(q, k, v, 1.0, is_causal=True, diagonal=60),
        lambda q, k, v: glomo.attention(q, k, v, is_causal=True),
        lambda q, k, v: glomo.relu2_affinity(q, k, 1.0),
        lambda q, k, v: glomo.relu2_graph_mix(q, k, v[0], torch.ones(1), None, 1.0),
        lambda q, k, v: glomo.relu2_graph_mix(k, k, v[0], torch.ones(1), torch.ones(1), 1.0),
    ],
)
def test_nan_and_infinity_go_where_they_do_in_the_reference(op):
    for which, row, bad in ((0, 3, "nan"), (1, 50, "inf"), (1, 50, "nan"), (2, 10, "nan"), (2, 10, "inf")):
        tensors = [random(1, 70, 8), random(1, 90, 8), random(1, 90, 5)]
        tensors[which][0, row, 1] = float(bad)
        found = op(*tensors)
        with use_backend("reference"):
            expected = op(*tensors)
        # 0 times Inf or NaN is NaN in the reference; the kernels may skip a whole tile of weights that are all 0
        assert not (found.isnan() & ~expected.isnan()).any()
        if which < 2:
            assert torch.equal(found.isnan(), expected.isnan())


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
