import subprocess
import sys

import pytest
import torch

import glomo
from glomo.kernels import BACKENDS, backend, explain, use_backend
from glomo.kernels.configurations import Configuration
from glomo.kernels.launch import Launch, Operand
from glomo.kernels.tiles import TILE_ELEMENTS, lead_slices
from parity import IMPLEMENTATIONS, LargestTensor, random


def test_explain_says_which_and_why(monkeypatch):
    monkeypatch.delenv("GLOMO_BACKEND", raising=False)
    q = random(2, 3, 4)
    assert explain("attention", q.double()).startswith("attention runs on 'blocked'")
    with use_backend("reference"):
        assert "because use_backend forces it" in explain("attention", q)
        with use_backend("blocked"):
            assert "'blocked'" in explain("attention", q)
        assert "'reference'" in explain("attention", q)
    monkeypatch.setenv("GLOMO_BACKEND", "reference")
    assert "because GLOMO_BACKEND forces it" in explain("graph_mix", q)
    with pytest.raises(ValueError, match="no op 'softmax'"):
        explain("softmax", q)


def test_unknown_backends_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"use_backend's name is 'cuda'"), use_backend("cuda"):
        pass
    monkeypatch.setenv("GLOMO_BACKEND", "blokked")
    with pytest.raises(
        ValueError, match=r"GLOMO_BACKEND is 'blokked', but the backends are reference, blocked, cpu, triton"
    ):
        glomo.attention(*random(3, 1, 2, 4).unbind())


def test_forced_backend_really_runs(monkeypatch):
    """The reference saves its graph for autograd, the blocked op is a single node."""
    q = random(2, 3, 4).requires_grad_()
    names = {}
    for name in IMPLEMENTATIONS:
        with use_backend(name):
            names[name] = glomo.relu2_attention(q, q, q).grad_fn.name()
    assert "relu2_attention_blocked" in names["blocked"]
    assert "relu2_attention_blocked" not in names["reference"]


def test_triton_says_why_it_cannot(monkeypatch):
    """A forced backend that cannot do a call raises; the automatic choice falls back."""
    monkeypatch.delenv("GLOMO_BACKEND", raising=False)
    q = random(2, 3, 4, dtype=torch.float64)
    assert "float64" in explain("relu2_attention", q) or "need a GPU" in explain("relu2_attention", q)
    with use_backend("triton"), pytest.raises(ValueError, match="use_backend forces the backend 'triton', but"):
        glomo.relu2_attention(q, q, q)
    if IMPLEMENTATIONS[-1] == "triton":
        wide = random(2, 3, 257)
        with use_backend("triton"), pytest.raises(ValueError, match="257 columns, and the Triton kernels take 256"):
            glomo.relu2_attention(wide, wide, wide)


def test_a_gpu_that_is_too_small_gets_a_sentence():
    class OutOfResources(Exception):
        pass

    class Kernel:
        __name__ = "forward_kernel"

        def __getitem__(self, grid):
            raise OutOfResources("out of resource: shared memory")

    query = Operand(random(3, 4), 0, 0, 0, 4, 1)
    launch = Launch(Kernel(), 1, {"query": query}, {}, Configuration(128, 64, 64, 4, 2))
    with pytest.raises(RuntimeError, match=r"too small for the tiles \(128 x 64\).*use_backend\(\"blocked\"\)"):
        launch.run()


@pytest.mark.parametrize("op", ["relu2_attention", "attention", "relu2_graph_mix"])
def test_no_tensor_larger_than_a_tile_is_alive(op):
    """T x S would be 16 million numbers here; a tile is half a million."""
    t = 4096
    q, k, v = (random(1, 2, t, 4).requires_grad_() for _ in range(3))
    with use_backend("blocked"), LargestTensor() as seen:
        if op == "relu2_graph_mix":
            w = torch.ones(2, requires_grad=True)
            out = glomo.relu2_graph_mix(q, k, v[:, 0], w, w, num_heads=1, is_causal=True)
        else:
            out = getattr(glomo, op)(q, k, v, is_causal=True)
        out.sum().backward()
    assert 0 < seen.largest <= TILE_ELEMENTS


def test_tiles_cover_the_leading_dimensions_once():
    for shape in [(), (1,), (7,), (2, 3), (4, 1, 5), (3, 2, 2)]:
        for count in (0, 1, 2, 3, 5, 100):
            hits = torch.zeros(shape)
            for index in lead_slices(shape, count):
                hits[index] += 1
                assert hits[index].numel() <= max(count, 1)
            assert (hits == 1).all()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_same_bits_when_repeated(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            q, k, v = (random(2, 4, 150, 16).requires_grad_() for _ in range(3))
            out = glomo.relu2_attention(q, k, v, is_causal=True, dropout_p=0.1)
            out.square().sum().backward()
            results.append((out, q.grad, k.grad, v.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", BACKENDS)
def test_meta_tensors_have_the_right_shapes(name):
    q, k, v = (torch.empty(2, 4, t, e, device="meta") for t, e in ((5, 8), (7, 8), (7, 3)))
    with use_backend(name):
        out, z = glomo.relu2_attention(q, k, v, return_normalizer=True)
        assert out.shape == (2, 4, 5, 3)
        assert z.shape == (2, 4, 5)
        if name != "triton":
            assert glomo.attention(q, k, v).shape == (2, 4, 5, 3)
            weights = torch.empty(4, device="meta")
            assert glomo.relu2_graph_mix(q, k, v[:, 0], (weights, weights))[1].shape == (2, 5, 3)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_choice_for_wide_fp32_is_traced_whole(precision):
    """On a GPU it depends on PyTorch's matmul precision, which torch.compile has to read; "meta" tensors stand in."""

    def call(query):
        return query + (backend.why_not_triton("relu2_attention", query) is None)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        torch._dynamo.reset()
        torch.compile(call, fullgraph=True, backend="eager")(torch.empty(2, 8, 100, device="meta"))
        reason = backend.why_not_triton("relu2_attention", torch.empty(2, 8, 100, device="meta"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert ("fp32 products of 100 columns" in (reason or "")) == (precision == "highest")


def test_the_newer_setting_of_tf32_is_traced_too():
    """In a process of its own: PyTorch does not let the two ways of setting it mix."""
    code = """
import torch
from glomo.kernels import backend
torch.backends.cuda.matmul.fp32_precision = "tf32"
call = lambda query: query + (backend.why_not_triton("relu2_attention", query) is None)
query = torch.empty(2, 8, 100, device="meta")
torch.compile(call, fullgraph=True, backend="eager")(query)
reason = backend.why_not_triton("relu2_attention", query)
assert "fp32 products" not in (reason or ""), reason
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
