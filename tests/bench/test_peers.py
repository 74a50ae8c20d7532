from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import glomo
from bench import flex, measure, peers
from bench import running as running_module
from bench.cases import Case
from bench.peers import PEERS, around
from bench.problems import make
from bench.running import Running, disagreement
from glomo.kernels.backend import forced_backend

OPS = ("relu2_affinity", "relu2_attention", "attention", "relu2_attention_varlen", "attention_varlen")
SMALL = {op: Case(op, batch=2, heads=2, length=12, dim=8, value_dim=8) for op in OPS}
SMALL |= {op: Case(op, 2, 2, length=12, dim=4, value_dim=8, layers=3) for op in ("graph_mix", "relu2_graph_mix")}
SLOW = ("compile", "flex")
MORE = [replace(SMALL[op], chains=True) for op in ("graph_mix", "relu2_graph_mix")]
MORE.append(replace(SMALL["attention"], causal=False, padded=True))


@pytest.fixture(autouse=True)
def _memory_is_not_the_question(monkeypatch):
    monkeypatch.setattr(measure, "peak_memory", lambda work, device: 0)


@pytest.mark.parametrize("case", [*SMALL.values(), *MORE], ids=lambda case: case.id)
def test_peers_compute_the_op(case):
    running = Running(replace(case, backward=True), "cpu")
    found = {peer: running.prepare(peer).reason for peer in PEERS[case.op] if peer not in SLOW}
    needs_gpu = "needs a CUDA GPU"
    cannot = {"SDPA efficient": needs_gpu, "SDPA cuDNN": needs_gpu, "varlen_attn": needs_gpu}
    cannot["nested SDPA"] = "No viable backend for scaled_dot_product_attention was found"
    assert found == {peer: cannot.get(peer, "") for peer in found}


@pytest.mark.parametrize("op", [op for op in SMALL if "flex" in PEERS[op]])
def test_flex_computes_the_op(op, monkeypatch):
    monkeypatch.setattr(flex, "_flex", flex_attention)  # not compiled: slow in use, quick to test
    assert Running(replace(SMALL[op], chains="mix" in op), "cpu").prepare("flex").reason == ""
    if op == "attention":
        assert Running(MORE[-1], "cpu").prepare("flex").reason == ""


def test_score_mod_is_the_affinity_and_its_gradient_is_never_nan():
    scores = torch.randn(2, 3, 5, 7).double()
    bias = 0.1 + torch.rand(2, 3, 5).double() - scores.amax(-1)  # every row has a positive score, and some that are not
    scores[0, 0, 0, scores[0, 0, 0].argmin()] = -bias[0, 0, 0]  # a score of 0, whose logarithm has no gradient
    leaves = [scores.requires_grad_(), bias.requires_grad_()]
    b, h, t, j = torch.meshgrid(*(torch.arange(n) for n in scores.shape), indexing="ij")
    graph = flex.relu2_score_mod(bias)(scores, b, h, t, j).softmax(-1)
    rectified = (scores + bias[..., None]).relu()
    expected = rectified.square() / rectified.square().sum(-1, keepdim=True)
    torch.testing.assert_close(graph, expected)
    weights = torch.randn_like(graph)
    for got, want in zip(
        torch.autograd.grad((graph * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_compile_traces_the_reference_and_not_our_kernels():
    problem, seen = make(SMALL["relu2_attention"], "cpu"), []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with around("compile"):
        torch.compile(problem.call, backend=backend, dynamic=False)(*problem.tensors)
    assert any("matmul" in s for s in seen)
    assert not any("glomo" in s for s in seen)


def test_a_peer_that_is_wrong_or_cannot_is_a_reason(monkeypatch):
    def wrong(problem):
        return lambda *tensors: 1.1 * problem.call(*tensors)

    def cannot(problem):
        raise NotImplementedError("no such kernel. Try another one.")

    op = "relu2_affinity"
    monkeypatch.setitem(PEERS, op, {**PEERS[op], "wrong": wrong, "cannot": cannot})
    running = Running(SMALL[op], "cpu")
    assert "of the output are off" in running.prepare("wrong").reason
    assert running.prepare("cannot").reason == "no such kernel"
    assert running.prepare("glomo").reason == ""
    monkeypatch.setattr(measure, "free_memory", lambda: 1000)
    assert "holds whole T x S tensors" in running.prepare("eager").reason


def test_a_peer_is_held_to_the_automatic_backend(monkeypatch):
    forced = []
    problem = make(SMALL["relu2_affinity"], "cpu")

    def call(*tensors):
        forced.append(forced_backend())
        return problem.call(*tensors)

    monkeypatch.setattr(running_module, "make", lambda case, device: replace(problem, call=call))
    Running(SMALL["relu2_affinity"], "cpu").prepare("eager")
    assert forced[0] is None
    assert forced[1] == ("reference", "use_backend")


def test_without_ours_no_peer_is_compared(monkeypatch):
    def fails(case, device):
        raise RuntimeError("no memory for that")

    monkeypatch.setattr(running_module, "make", fails)
    running = Running(SMALL["relu2_affinity"], "cpu")
    assert {running.prepare(peer).reason for peer in ("glomo", "authors")} == {"no memory for that"}


def test_disagreement():
    one = torch.ones(200)
    few = one.clone()
    few[0] = 5
    assert disagreement([few], [one], 0.01) == ""  # 1 of 200: a pair beside a dead row
    assert "NaN" in disagreement([one * float("nan")], [one], 0.01)
    assert "gradient 1" in disagreement([one, 1.1 * one], [one, one], 0.01)
    assert "shape" in disagreement([one[1:]], [one], 0.01)


def test_clusters_leave_whole_tiles_empty():
    problem = make(replace(SMALL["relu2_attention"], length=64, dim=16, causal=False, clusters=4), "cpu")
    query, key, _, bias = problem.tensors
    tiles = glomo.relu2_affinity(query, key, bias).unflatten(-1, (4, 16)).unflatten(-3, (4, 16)).amax((-3, -1))
    assert torch.equal(tiles > 0, torch.eye(4).bool().expand_as(tiles))


def test_authors_step_runs_the_authors_formulation(monkeypatch):
    called = []
    case = Case("pretrain_step", batch=1, heads=8, length=24, layers=3, backward=True)
    attention = peers.authors.authors_attention
    monkeypatch.setattr(peers.authors, "authors_attention", lambda *a, **k: called.append(1) or attention(*a, **k))
    running = Running(case, "cpu")
    assert running.prepare("glomo").reason == ""
    assert not called
    assert running.prepare("authors").reason == ""
    assert called
