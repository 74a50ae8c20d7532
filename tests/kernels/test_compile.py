"""The ops inside torch.compile, torch.export and autocast."""

import pytest
import torch

import glomo
from glomo.kernels import cpu_library
from parity import DEVICE, DTYPES, INTERPRETED, random


def relu2_attention(q, k, v, b):
    return glomo.relu2_attention(q, k, v, b, is_causal=True, diagonal=-1, return_normalizer=True)


def relu2_affinity(q, k, v, b):
    return glomo.relu2_affinity(q, k, b, is_causal=True)


def attention(q, k, v, b):
    return glomo.attention(q, k, v, is_causal=True, return_lse=True)


def relu2_graph_mix(q, k, v, b):
    w = torch.softmax(q.new_ones(q.size(1)), 0)
    return glomo.relu2_graph_mix(q, k, v[:, 0], w, w, b, num_heads=2)


def graph_mix(q, k, v, b):
    w = torch.softmax(q.new_ones(q.size(1)), 0)
    return glomo.graph_mix(q @ k.mT, v[:, 0], (w, w), num_heads=2)


def varlen(q, k, v, b):
    cu = torch.arange(0, q.size(0) * q.size(2) + 1, q.size(2))
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    first = glomo.relu2_attention_varlen(q, k, v, cu, cu, q.size(0), q.size(0))
    return first + glomo.attention_varlen(q, k, v, cu, cu, q.size(0), q.size(0))


CALLS = [relu2_attention, relu2_affinity, attention, relu2_graph_mix, graph_mix, varlen]


def inputs(t=12):
    return [random(2, 4, t, 8), random(2, 4, t, 8), random(2, 4, t, 8), random(4, 1, 1)]


def outputs_and_gradients(call, tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = call(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    return [*out, *torch.autograd.grad(sum(o.square().sum() for o in out), tensors, allow_unused=True)]


@pytest.mark.parametrize("call", CALLS)
def test_compiles_whole_with_static_and_dynamic_shapes(call):
    torch._dynamo.reset()
    for dynamic in (False, True):
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for t in (12, 17):
            tensors = inputs(t)
            expected, found = outputs_and_gradients(call, tensors), outputs_and_gradients(compiled, tensors)
            for a, b in zip(expected, found, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("call", [relu2_attention, attention, varlen])
def test_compiles_with_inductor(call):
    """Inductor relies on the strides that the fake versions promise: here on inputs that are not contiguous."""
    torch._dynamo.reset()
    tensors = inputs()
    tensors[:3] = [random(2, 12, 4, 8).transpose(1, 2) for _ in range(3)]
    expected = outputs_and_gradients(call, tensors)
    found = outputs_and_gradients(torch.compile(call, fullgraph=True), tensors)
    for a, b in zip(expected, found, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="what the C++ kernels do")
@pytest.mark.parametrize("call", [relu2_attention, attention])
def test_output_and_gradients_are_laid_out_as_the_query(call):
    """Heads side by side stay so, and whoever puts them together copies nothing."""
    tensors = inputs()
    expected = outputs_and_gradients(call, tensors)
    tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    found = outputs_and_gradients(call, tensors)
    for place, (a, b) in enumerate(zip(expected, found, strict=True)):
        if b is not None:
            assert torch.equal(a, b)
            assert a.is_contiguous()
            assert (b.transpose(1, 2) if place in (0, 2, 3, 4) else b).is_contiguous()  # not lse or Z, not the bias's


@pytest.mark.parametrize("call", [relu2_attention, attention])
def test_lengths_that_only_the_data_tell(call):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v, b: call(q, k, v, b)[0], fullgraph=True, backend="aot_eager")
    for q in (random(2, 4, 12, 8), random(2, 12, 4, 8).transpose(1, 2)):
        k, v, b = inputs()[1:]
        expected = call(q, k, v, b)[0]
        torch._dynamo.decorators.mark_unbacked(q, 2)
        assert torch.equal(compiled(q, k, v, b), expected)


def test_dropout_inside_compile_draws_anew():
    torch._dynamo.reset()
    q = random(2, 4, 12, 8)
    call = torch.compile(lambda q: glomo.relu2_attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(call(q), call(q))


@pytest.mark.parametrize("call", CALLS)
def test_exports(call):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    tensors = tuple(inputs())
    program = torch.export.export(Module(), tensors)
    torch.testing.assert_close(program.module()(*tensors), call(*tensors))


@pytest.mark.parametrize("call", [relu2_attention, relu2_affinity])
def test_exports_with_a_dynamic_length(call):
    """The program exported at one length runs at another."""

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    length = {2: torch.export.Dim("length", min=2, max=4000)}
    program = torch.export.export(
        Module(), tuple(inputs(12)), dynamic_shapes={"tensors": (length, length, length, None)}
    )
    tensors = inputs(21)
    torch.testing.assert_close(program.module()(*tensors), call(*tensors))


@pytest.mark.parametrize("call", CALLS)
def test_autocast_casts_as_for_sdpa(call):
    tensors = inputs()
    dtype = DTYPES[-1]
    with torch.autocast(DEVICE, dtype=dtype):
        out = call(*tensors)
        sdpa = torch.nn.functional.scaled_dot_product_attention(*tensors[:3])
    out = out if isinstance(out, tuple) else (out,)
    assert out[0].dtype == sdpa.dtype == dtype
    expected = call(*(t.to(dtype) for t in tensors[:3]), tensors[3])
    expected = expected if isinstance(expected, tuple) else (expected,)
    if call is not graph_mix:  # there autocast also changes the product that makes the graphs
        for a, b in zip(out, expected, strict=True):
            assert torch.equal(a, b)
    if INTERPRETED:  # no fp64 there
        return
    wide = call(*(t.double() for t in tensors[:3]), tensors[3])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        untouched = call(*(t.double() for t in tensors[:3]), tensors[3])
    torch.testing.assert_close(untouched, wide)


SAMPLES = {
    "relu2_affinity_blocked": lambda q, k, v, b: (q, k, b, None, -1, 1.0, 1e-6),
    "relu2_attention_blocked": lambda q, k, v, b: (q, k, v, b, None, torch.tensor(5), 0.3, -1, 1.0, 1e-6),
    "relu2_attention_varlen_blocked": lambda q, k, v, b: (
        *(t[0] for t in (q, k, v)),
        *(torch.tensor([0, 3, 4]), torch.tensor([0, 3, 4]), None, None, 0.0, None, 1.0, 1e-6),
    ),
    "graph_mix_blocked": lambda q, k, v, b: (q @ k.mT, v[:, 0], torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4), 2),
    "relu2_graph_mix_blocked": lambda q, k, v, b: (
        *(q, k, v[:, 0], torch.ones(1, 1, 1, 4), None, b, torch.ones(1, 12, dtype=torch.bool), 2, 0, 1.0, 1e-6),
    ),
    "attention_blocked": lambda q, k, v, b: (q, k, v, random(12, 12), None, 0.0, None, 0.3),
    "attention_varlen_blocked": lambda q, k, v, b: (
        *(t[0] for t in (q, k, v)),
        *(torch.tensor([0, 3, 4]), torch.tensor([0, 3, 4]), None, 0.0, 0, 0.3),
    ),
}
if not INTERPRETED and DEVICE == "cpu" and cpu_library.MISSING is None:
    for name, sample in list(SAMPLES.items()):
        # whether a backward pass may follow, and whether the output's heads are to lie side by side
        more = (True,) if "varlen" in name else (True, True) if "attention" in name else ()
        SAMPLES[name.replace("blocked", "cpu")] = lambda *tensors, s=sample, more=more: (*s(*tensors), *more)
if INTERPRETED or DEVICE == "cuda":
    on_triton = {name.replace("blocked", "triton"): sample for name, sample in SAMPLES.items() if "blocked" in name}
    SAMPLES = on_triton if INTERPRETED else SAMPLES | on_triton


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("contiguous", [True, False])
def test_opcheck(name, contiguous):
    def leaf(t):
        return t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    tensors = inputs()
    if not contiguous:
        tensors[:3] = [random(2, 12, 4, 8).transpose(1, 2) for _ in range(3)]
    arguments = tuple(leaf(a) for a in SAMPLES[name](*tensors))
    torch.library.opcheck(getattr(torch.ops.glomo, name).default, arguments)
