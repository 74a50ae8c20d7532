"""A case made concrete: its tensors on a device, and the op as a function of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import glomo
from bench.cases import ATTENTION, DTYPES, VARLEN, Case
from bench.flops import lengths
from glomo.nn import GLoMo, GLoMoConfig

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """`call(*tensors)` is the op of the case; every peer is a function of the same tensors."""

    case: Case
    tensors: list[Tensor]
    call: Call

    @property
    def wanted(self) -> list[Tensor]:
        """What gets a gradient in the backward pass."""
        return [t for t in self.tensors if t.is_floating_point()]


def make(case: Case, device: str) -> Problem:
    """The problem with values from a fixed seed."""
    torch.manual_seed(0)
    if case.op == "pretrain_step":
        return _pretrain_step(case, device)
    if case.op in VARLEN:
        tensors = _packed(case)
    elif case.op == "graph_mix":
        tensors = _graphs_and_features(case)
    else:
        tensors = _queries_and_keys(case)
    tensors = [t.to(device, DTYPES[case.dtype]) if t.is_floating_point() else t.to(device) for t in tensors]
    for t in tensors:
        t.requires_grad_(case.backward and t.is_floating_point())
    return Problem(case, tensors, op_call(case))


def op_call(case: Case) -> Call:
    """The public op as a function of the case's tensors alone."""
    op = getattr(glomo, case.op)
    strict = {"is_causal": case.causal, "diagonal": -1 if case.causal else 0}
    longest = case.length
    if case.op == "attention":
        return lambda query, key, value, mask=None: op(query, key, value, mask, is_causal=case.causal)
    if case.op == "relu2_affinity":
        return lambda query, key, bias: op(query, key, bias, **strict)
    if case.op == "attention_varlen":
        return lambda query, key, value, cu: op(query, key, value, cu, cu, longest, longest, is_causal=case.causal)
    if case.op == "relu2_attention_varlen":
        return lambda query, key, value, bias, cu: op(
            query, key, value, cu, cu, longest, longest, bias=bias, is_causal=case.causal, diagonal=-1
        )
    if case.op == "graph_mix":
        return lambda graphs, features, weights, chains=None: op(
            graphs, features, weights, chains, num_heads=case.heads
        )
    if case.op == "relu2_graph_mix":
        return lambda query, key, bias, features, weights, chains=None: op(
            query, key, features, weights, chains, bias, num_heads=case.heads, **strict
        )
    return lambda query, key, value, bias: op(query, key, value, bias, **strict)


def _queries_and_keys(case: Case) -> list[Tensor]:
    """query, key, then value and bias as the op takes them, in the layout that projections to (B, T, H * E) leave.

    The ReLU² scores have mean 0.5 and standard deviation 1 without a scale: about two pairs of three are positive.
    """
    n, soften = case.layers * case.heads, 1 if case.op in ATTENTION[1:] else case.dim**-0.25

    def projection(width: int, factor: float = 1.0) -> Tensor:
        return torch.randn(case.batch, case.length, n, width).mul_(factor).transpose(1, 2)

    query, key, bias = projection(case.dim, soften), projection(case.dim, soften), projection(1, 0.1) + 0.5
    if case.clusters:
        centres = 2 * torch.eye(case.dim)[torch.arange(case.length) * case.clusters // case.length]
        # <q, k> is near 4 within a group and near 0 between groups, where the bias of -2 makes it negative
        query, key, bias = 0.1 * query + centres, 0.1 * key + centres, bias - 2.5
    if case.op == "relu2_affinity":
        return [query, key, bias]
    if case.op == "relu2_graph_mix":
        return [query, key, bias, torch.randn(case.batch, case.length, case.value_dim), *_weights(case)]
    value = projection(case.value_dim)
    if case.padded:
        mask = torch.arange(case.length) < torch.tensor(lengths(case))[:, None]
        return [query, key, value, mask[:, None, None]]
    return [query, key, value] if case.op == "attention" else [query, key, value, bias]


def _weights(case: Case) -> list[Tensor]:
    """The weight of every graph, and with chains of every running product."""
    n = case.layers * case.heads
    return [torch.rand(n) / n for _ in range(1 + case.chains)]


def _graphs_and_features(case: Case) -> list[Tensor]:
    n = case.layers * case.heads
    graphs = torch.randn(case.batch, n, case.length, case.length).relu_().tril_(-1)
    graphs /= graphs.sum(-1, keepdim=True) + 1e-6
    return [graphs, torch.randn(case.batch, case.length, case.value_dim), *_weights(case)]


def _packed(case: Case) -> list[Tensor]:
    """query, key, value, for the ReLU² op a bias per target, and cu_seqlens."""
    total = sum(lengths(case))
    soften = case.dim**-0.25 if case.op == "relu2_attention_varlen" else 1
    query, key = torch.randn(2, total, case.heads, case.dim).mul_(soften).unbind()
    value = torch.randn(total, case.heads, case.value_dim)
    bias = [0.5 + 0.1 * torch.randn(total, case.heads)] if case.op == "relu2_attention_varlen" else []
    return [query, key, value, *bias, torch.tensor([0, *itertools.accumulate(lengths(case))], dtype=torch.int32)]


def _pretrain_step(case: Case, device: str) -> Problem:
    """One step of the released model, the embedding smaller so that the vocabulary does not drown the rest."""
    config = GLoMoConfig.preset("released", vocab_size=2000, head_dim=case.dim, positions=20)
    model = GLoMo(config).to(device, DTYPES[case.dtype])
    tokens = torch.randint(2, 2000, (case.batch, case.length), device=device)
    sizes = torch.full((case.batch,), case.length, device=device)
    # every call draws the same positions
    return Problem(case, list(model.parameters()), lambda *_: model(tokens, sizes, torch.Generator().manual_seed(0)))
