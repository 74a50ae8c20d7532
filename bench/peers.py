"""What the ops are measured against. `PEERS[op][name](problem)` is a function of the problem's tensors; a peer that
cannot do the problem raises, there or when it is called, and the message is its row in the results.

A yardstick computes something else (softmax attention beside a ReLU² op): its time is shown, its values are not
compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import authors, flex
from bench.flops import lengths
from bench.problems import Call, Problem
from glomo.kernels import relu2_attention, use_backend

Build = Callable[[Problem], Call]
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
YARDSTICKS = {"relu2_attention": tuple(SDPA)}
WHOLE_GRAPHS = ("eager", "compile", "authors", "padded eager", "padded authors")  # T x S tensors in memory


def around(peer: str) -> AbstractContextManager[Any]:
    """The context that a peer is built and runs in, entered outside of the timing."""
    if peer in SDPA:
        return sdpa_kernel(SDPA[peer])
    if peer in ("eager", "compile", "padded eager"):
        return use_backend("reference")
    return nullcontext()


def glomo_itself(problem: Problem) -> Call:
    """The op as a user calls it: the automatic choice of the backend, or under `around` the reference."""
    return problem.call


def compiled(problem: Problem) -> Call:
    return torch.compile(problem.call, dynamic=False)


def sdpa(problem: Problem) -> Call:
    """Softmax attention on the same queries, keys and values; a bias is not read."""
    return lambda query, key, value, *rest: F.scaled_dot_product_attention(
        query, key, value, rest[0] if problem.case.padded else None, is_causal=problem.case.causal
    )


def on_gpu(build: Build) -> Build:
    def refuse_or_build(problem: Problem) -> Call:
        if problem.tensors[0].device.type != "cuda":
            raise RuntimeError("needs a CUDA GPU")
        return build(problem)

    return refuse_or_build


def _mask(problem: Problem, strict: bool) -> Any:
    case, query = problem.case, problem.tensors[0]
    if case.padded:
        return flex.block_mask(flex.within(problem.tensors[-1]), case.length, query.device, case.batch)
    return flex.block_mask(flex.earlier(strict) if case.causal else None, case.length, query.device)


def _packed_mask(problem: Problem, strict: bool) -> Any:
    query, cu_seqlens = problem.tensors[0], problem.tensors[-1]
    return flex.block_mask(flex.same_sequence(cu_seqlens, flex.earlier(strict)), len(query), query.device)


def authors_relu2(problem: Problem) -> Call:
    causal = problem.case.causal
    return lambda query, key, value, bias: authors.authors_attention(query, key, value, bias, causal)


def authors_relu2_mix(problem: Problem) -> Call:
    case = problem.case

    def call(
        query: Tensor, key: Tensor, bias: Tensor, features: Tensor, weights: Tensor, chains: Tensor | None = None
    ) -> Tensor:
        return authors.authors_graph_mix(query, key, features, weights, chains, bias, case.heads, case.causal)

    return call


def reassociated(problem: Problem) -> Call:
    """graph_mix without products of graphs, one matrix product a layer: A_l (Λ_{l-1} F)."""
    heads = problem.case.heads

    def call(graphs: Tensor, features: Tensor, weights: Tensor, chains: Tensor | None = None) -> Tensor:
        out = torch.einsum("n,bnts->bts", weights, graphs) @ features
        state = features[:, None]
        for layer in range(0, graphs.size(1) if chains is not None else 0, heads):
            state = graphs[:, layer : layer + heads] @ state
            out = out + torch.einsum("h,bhte->bte", chains[layer : layer + heads], state)  # type: ignore[index]
        return out

    return call


def padded(attend: Callable[..., Any]) -> Build:
    """A packed batch as a padded one: what a model without varlen does. Causal only: the padding stands at the end, so
    no real target reads it, and no mask is needed."""

    def build(problem: Problem) -> Call:
        starts, length = problem.tensors[-1], problem.case.length
        position = torch.arange(length, device=starts.device)
        real = position < starts.diff()[:, None]
        index = (starts[:-1, None] + position).where(real, 0)

        def call(*tensors: Tensor) -> Tensor:
            padded = [x[index].transpose(1, 2) for x in tensors[:3]]
            padded += [x[index].transpose(1, 2)[..., None] for x in tensors[3:-1]]
            return attend(*padded).transpose(1, 2)[real]

        return call

    return build


def nested(problem: Problem) -> Call:
    """SDPA on nested tensors, PyTorch's own form of a packed batch."""
    # one tensor of offsets, by which PyTorch knows that the three are ragged alike
    offsets, sizes = problem.tensors[-1].long(), lengths(problem.case)

    def call(query: Tensor, key: Tensor, value: Tensor, _: Tensor) -> Tensor:
        def jagged(x: Tensor) -> Tensor:
            packed = torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=min(sizes), max_seqlen=max(sizes))
            return packed.transpose(1, 2)

        out = F.scaled_dot_product_attention(jagged(query), jagged(key), jagged(value), is_causal=problem.case.causal)
        return out.transpose(1, 2).values()

    return call


def varlen_flash(problem: Problem) -> Call:
    """torch.nn.attention.varlen, FlashAttention's packed kernel."""
    from torch.nn.attention.varlen import varlen_attn

    longest = problem.case.length
    # how causality is said has changed between versions of PyTorch
    old = "is_causal" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if old else {"window_size": (-1, 0)}
    run: Any = varlen_attn
    return lambda query, key, value, cu: run(query, key, value, cu, cu, longest, longest, **causal)


def authors_step(problem: Problem) -> Call:
    """The pre-training step with GLoMo's modules on the authors' formulation."""

    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Any, _mask: Any, *, eps: float, **_: Any) -> Tensor:
        return authors.authors_attention(query, key, value, bias, eps=eps)

    def call(*tensors: Tensor) -> Tensor:
        with mock.patch("glomo.nn.graphs.relu2_attention", attention):
            return problem.call(*tensors)

    return call


_OURS: dict[str, Build] = {"glomo": glomo_itself, "eager": glomo_itself}
_SDPA: dict[str, Build] = {name: sdpa if name == "SDPA flash" else on_gpu(sdpa) for name in SDPA}

PEERS: dict[str, dict[str, Build]] = {
    "relu2_attention": {
        **_OURS,
        "compile": compiled,
        "authors": authors_relu2,
        "flex": lambda problem: flex.flex_relu2(_mask(problem, strict=True)),
        **_SDPA,
    },
    "attention": {
        **_OURS,
        "compile": compiled,
        "flex": lambda problem: flex.flex_softmax(_mask(problem, strict=False)),
        **_SDPA,
    },
    "relu2_affinity": {
        **_OURS,
        "compile": compiled,
        "authors": lambda problem: (
            lambda query, key, bias: authors.authors_affinity(query, key, bias, problem.case.causal)
        ),
    },
    "relu2_attention_varlen": {
        **_OURS,
        "padded eager": padded(lambda *tensors: relu2_attention(*tensors, is_causal=True, diagonal=-1)),
        "padded authors": padded(authors.authors_attention),
        "flex": lambda problem: flex.packed(flex.flex_relu2(_packed_mask(problem, strict=True))),
    },
    "attention_varlen": {
        **_OURS,
        "padded SDPA": padded(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        "nested SDPA": nested,
        "varlen_attn": on_gpu(varlen_flash),
        "flex": lambda problem: flex.packed(flex.flex_softmax(_packed_mask(problem, strict=False))),
    },
    "graph_mix": {
        **_OURS,
        "compile": compiled,
        "authors": lambda problem: (
            lambda graphs, features, weights, chains=None: authors.authors_mix(
                graphs, features, weights, chains, problem.case.heads
            )
        ),
        "reassociated": reassociated,
    },
    "relu2_graph_mix": {
        **_OURS,
        "compile": compiled,
        "authors": authors_relu2_mix,
        "flex": lambda problem: flex.flex_relu2_mix(_mask(problem, strict=True), problem.case.heads),
    },
    "pretrain_step": {"glomo": glomo_itself, "authors": authors_step},
}
