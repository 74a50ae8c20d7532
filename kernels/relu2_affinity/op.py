"""relu2_affinity: argument checks, the registered op, the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import (
    EPS,
    HeadGroups,
    accumulator_dtype,
    autocast_cast,
    bias_tensor,
    broadcast_lead,
    check_bool_mask,
    check_broadcastable,
    check_diagonal,
    check_eps,
    check_number,
    check_qk,
    check_same_device,
)
from ..backend import select_backend
from ..registration import differentiable_op
from . import blocked, cpu, reference, triton


def _fake(query, key, bias, attn_mask, diagonal, scale, eps):
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    normalizer = query.new_empty(*lead, query.size(-2), dtype=accumulator_dtype(query.dtype))
    return query.new_empty(*lead, query.size(-2), key.size(-2)), normalizer


_blocked = differentiable_op(
    "relu2_affinity_blocked",
    blocked.relu2_affinity_forward,
    blocked.relu2_affinity_backward,
    _fake,
    differentiable=("query", "key", "bias"),
)

_triton = differentiable_op(
    "relu2_affinity_triton",
    triton.relu2_affinity_forward,
    triton.relu2_affinity_backward,
    _fake,
    differentiable=("query", "key", "bias"),
)


def _fake_cpu(*inputs):
    return _fake(*inputs)[0]


_cpu = differentiable_op(
    "relu2_affinity_cpu",
    cpu.relu2_affinity_forward,
    cpu.relu2_affinity_backward,
    _fake_cpu,
    differentiable=("query", "key", "bias"),
)

_BACKENDS = {
    "reference": reference.relu2_affinity,
    "blocked": lambda *inputs: _blocked(*inputs)[0],
    "cpu": _cpu,
    "triton": lambda *inputs: _triton(*inputs)[0],
}


def relu2_affinity(
    query: Tensor,
    key: Tensor,
    bias: float | Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    diagonal: int = 0,
    scale: float = 1.0,
    eps: float = EPS,
    enable_gqa: bool = False,
) -> Tensor:
    """The GLoMo graph: ReLU²-normalised key-query affinities.

    .. code-block:: text

        s[t, j] = scale * <query_t, key_j> + bias[t, j]
        r[t, j] = relu(s[t, j])   on allowed pairs, 0 elsewhere
        Z[t]    = sum_j r[t, j]²
        A[t, j] = r[t, j]² / (Z[t] + eps)

    Row t of the graph A holds the weights with which target t reads its sources j. A row whose Z is 0 is a zero row,
    value and gradient, never NaN. Scores, squares and sums are fp32 (fp64 for fp64 inputs).

    Args:
        query: (..., T, E), floating point, any strides.
        key: (..., S, E), of the query's dtype; leading dimensions broadcast against the query's.
        bias: a float, or a tensor of the query's dtype or fp32 that broadcasts to (..., T, S): scalar, per head,
            per target (..., T, 1), per source (..., 1, S) or full. It gets its gradient in its own shape and dtype.
            GLoMo's threshold is ``bias = -threshold``.
        attn_mask: bool, broadcastable to (..., T, S); True = may be read.
        is_causal: target t reads the sources j <= t + diagonal only (``torch.tril``, top-left aligned).
        diagonal: with is_causal; -1 means strictly earlier sources, as in GLoMo.
        scale: factor of the products (no 1/sqrt(E) by default, as published).
        eps: added to Z, >= 0; 0 is allowed and exact.
        enable_gqa: query (..., H, T, E) and key (..., Hk, S, E) with H a multiple of Hk.

    Returns:
        A (..., T, S), of the query's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape; the sentence names it.

    Example:
        >>> graph = glomo.relu2_affinity(query, key, bias=1.0, is_causal=True, diagonal=-1)

    Source: Yang et al., "GLoMo: Unsupervised Learning of Transferable Relational Graphs", NeurIPS 2018.
    """
    query, key = autocast_cast(query, key)
    check_qk(query, key, None)
    bias = bias_tensor(bias, query)
    check_bool_mask(attn_mask)
    check_same_device(query, bias=bias, attn_mask=attn_mask)
    check_eps(eps)
    check_number("scale", scale)
    groups = HeadGroups(query, key, None) if enable_gqa else None
    if groups:
        query, key = groups.split_query(query), groups.split_key(key)
        bias, attn_mask = groups.split_pairs("bias", bias), groups.split_pairs("attn_mask", attn_mask)
    pairs = (*broadcast_lead(query=query, key=key), query.size(-2), key.size(-2))
    for name, t in (("bias", bias), ("attn_mask", attn_mask)):
        if t is not None:
            check_broadcastable(name, t, pairs)
    arguments = (query, key, bias, attn_mask, check_diagonal(is_causal, diagonal), float(scale), float(eps))
    affinity = _BACKENDS[select_backend("relu2_affinity", query, key)](*arguments)
    return affinity.flatten(-4, -3) if groups else affinity
