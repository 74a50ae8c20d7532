"""What only a GPU can show of the Triton kernels: races, CUDA graphs, compiled code, memory, bf16, large grids."""

import pytest
import torch

import glomo
from glomo.kernels import use_backend
from parity import check_parity

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _forced():
    with use_backend("triton"):
        yield


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


def inputs(t=500, dtype=torch.bfloat16):
    """query, key, value and a bias per target: four heads that share two keys."""
    shapes = [(2, 4, t, 64), (2, 2, t, 64), (2, 2, t, 100), (2, 4, t, 1)]
    return [randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def attend(query, key, value, bias):
    return glomo.relu2_attention(query, key, value, bias, is_causal=True, diagonal=-1, enable_gqa=True)


def results(call, tensors):
    out = call(*tensors)
    cotangent = torch.ones_like(out)
    return [out.detach(), *torch.autograd.grad(out, tensors, cotangent)]


def test_same_bits_in_250_runs():
    """A race would show as another result once in a while."""
    tensors = inputs()
    mask = torch.rand(500, 500, device="cuda") > 0.3

    def call(query, key, value, bias):
        torch.manual_seed(0)
        options = dict(attn_mask=mask, is_causal=True, dropout_p=0.1, enable_gqa=True)
        return glomo.relu2_attention(query, key, value, bias, **options)

    first = results(call, tensors)
    for _ in range(249):
        for a, b in zip(first, results(call, tensors), strict=True):
            assert torch.equal(a, b)


def test_graph_capture_and_replay_equal_eager():
    static = inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels, which a capture cannot
        for _ in range(2):
            results(attend, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(attend, static)
    for _ in range(3):
        fresh = inputs()
        with torch.no_grad():
            for t, new in zip(static, fresh, strict=True):
                t.copy_(new)
        graph.replay()
        for a, b in zip(captured, results(attend, fresh), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_equals_eager(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic)
    for t in (128, 200):
        tensors = inputs(t)
        for a, b in zip(results(compiled, tensors), results(attend, tensors), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_parity_of_a_middle_size_in_bf16(masked):
    mask = torch.rand(2, 1, 1000, 1000, device="cuda") > 0.5
    mask[..., 200:500] = False

    def call(query, key, value, bias):
        options = dict(is_causal=True, enable_gqa=True, scale=0.3, return_normalizer=True)
        return glomo.relu2_attention(query, key, value, bias, mask if masked else None, **options)

    check_parity(call, [t.detach() for t in inputs(1000)])


def peak(t):
    """Bytes that a forward and a backward pass take beyond their inputs."""
    tensors = inputs(t)
    results(attend, tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(attend, tensors)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_grows_linearly_with_the_length():
    """Four times the length would be sixteen times the memory if anything had a number for every pair."""
    assert peak(8192) <= 4.2 * peak(2048)


def test_more_programs_than_other_grid_dimensions_hold():
    """65535 is the limit of a grid's second and third dimensions."""
    query = randn(70000, 1, 16, dtype=torch.float32)
    out, z = glomo.relu2_attention(query, query, query, return_normalizer=True)
    expected = query.square().sum(-1, keepdim=True).square()
    torch.testing.assert_close(z[..., None], expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(out, query * (expected / (expected + 1e-6)), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_beyond_32_bits(dim):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    query, value = randn(130, 16), randn(130, 100)
    step = -(-(2**31) // (value.size(dim) - 2))
    strides = [1, 1]
    strides[dim] = step
    storage = torch.empty(step * value.size(dim), dtype=value.dtype, device="cuda")
    far = storage.as_strided(value.shape, strides).copy_(value)
    for a, b in zip(
        *(
            results(glomo.relu2_attention, [t.detach().requires_grad_() for t in (query, query, v)])
            for v in (value, far)
        ),
        strict=True,
    ):
        assert torch.equal(a, b)
