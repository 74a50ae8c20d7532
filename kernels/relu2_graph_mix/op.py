"""relu2_graph_mix: argument checks, the registered op, the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import (
    EPS,
    autocast_cast,
    bias_tensor,
    check_bool_mask,
    check_broadcastable,
    check_diagonal,
    check_eps,
    check_floating,
    check_last,
    check_number,
    check_rank,
    check_same_device,
)
from ..backend import select_backend
from ..graph_mix.op import Weights, canonical_mixtures, common_lead
from ..registration import differentiable_op
from . import blocked, cpu, reference, triton


def _fake(query, key, features, weights, *_):
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], features.shape[:-2])
    return features.new_empty(weights.size(0), *lead, query.size(-2), features.size(-1))


_blocked = differentiable_op(
    "relu2_graph_mix_blocked",
    blocked.relu2_graph_mix_forward,
    blocked.relu2_graph_mix_backward,
    _fake,
    differentiable=("query", "key", "features", "weights", "chain_weights", "bias"),
)

_cpu = differentiable_op(
    "relu2_graph_mix_cpu",
    cpu.relu2_graph_mix_forward,
    cpu.relu2_graph_mix_backward,
    _fake,
    differentiable=("query", "key", "features", "weights", "chain_weights", "bias"),
)


def _fake_triton(query, key, features, weights, *_):
    out = _fake(query, key, features, weights)
    return out, query.new_empty(out.shape[1:-2].numel(), *query.shape[-3:-1], dtype=torch.float32)


_triton = differentiable_op(
    "relu2_graph_mix_triton",
    triton.relu2_graph_mix_forward,
    triton.relu2_graph_mix_backward,
    _fake_triton,
    differentiable=("query", "key", "features", "weights", "chain_weights", "bias"),
    saved_outputs=1,
)

_BACKENDS = {"reference": reference.relu2_graph_mix, "blocked": _blocked, "cpu": _cpu, "triton": _triton}


def relu2_graph_mix(
    query: Tensor,
    key: Tensor,
    features: Tensor,
    weights: Weights,
    chain_weights: Weights | None = None,
    bias: float | Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    num_heads: int = 1,
    is_causal: bool = False,
    diagonal: int = 0,
    scale: float = 1.0,
    eps: float = EPS,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`glomo.graph_mix` of the graphs of :func:`glomo.relu2_affinity`, which are computed where they are needed.

    .. code-block:: text

        A[n] = relu2_affinity(query[n], key[n], bias[n], ...)
        Lambda[1, h] = A[1, h],   Lambda[l, h] = A[l, h] Lambda[l-1, h]      (matrix products, within a head)
        out = sum_n weights[n] A[n] F + sum_n chain_weights[n] Lambda[n] F

    Memory grows with T, not with T squared. With chains the C++ kernels keep some matrices T x S a thread and mixture
    where T is 1024 at most and that is faster than to keep products with the features; on a GPU the products with the
    features of a few heads are kept, in the features' dtype, as plain PyTorch would round them.

    Args:
        query: (..., N, T, E), N = layers * num_heads, layer-major; floating point, any strides.
        key: (..., N, S, E), of the query's dtype.
        features: (..., S, Ef), of the query's dtype.
        weights: (N,), or per batch (..., N), or per target (..., T, N) (dimensions of size 1 broadcast), or a tuple of
            M such tensors: M mixtures that share the scores.
        chain_weights: the same for the running products, which need T = S; None leaves them out.
        bias: as in relu2_affinity, broadcastable to (..., N, T, S).
        attn_mask: bool, broadcastable to (..., N, T, S); True = may be read.
        num_heads: heads of a layer; chains run within a head.
        is_causal, diagonal, scale, eps: as in relu2_affinity.

    Returns:
        (..., T, Ef) of the features' dtype; a tuple of M of them if weights is a tuple.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape; the sentence names it.

    Source: the mixed graph of Yang et al., "GLoMo: Unsupervised Learning of Transferable Relational Graphs",
    NeurIPS 2018.
    """
    query, key, features = autocast_cast(query, key, features)
    check_floating(query=query, key=key, features=features)
    check_rank(3, "(..., N, T, E)", query=query)
    check_rank(3, "(..., N, S, E)", key=key)
    check_rank(2, "(..., S, Ef)", features=features)
    n, num_targets, num_sources = query.size(-3), query.size(-2), key.size(-2)
    check_last("key", key, -1, query.size(-1), "the query")
    check_last("key", key, -3, n, "the query")
    check_last("features", features, -2, num_sources, "the keys")
    bias = bias_tensor(bias, query)
    check_bool_mask(attn_mask)
    check_same_device(query, bias=bias, attn_mask=attn_mask)
    check_eps(eps)
    check_number("scale", scale)
    lead = common_lead(query=query.shape[:-3], key=key.shape[:-3], features=features.shape[:-2])
    for name, t in (("bias", bias), ("attn_mask", attn_mask)):
        if t is not None:
            check_broadcastable(name, t, (*lead, n, num_targets, num_sources))
    w, c = canonical_mixtures(weights, chain_weights, lead, num_targets, num_sources, query, n, num_heads)
    run = _BACKENDS[select_backend("relu2_graph_mix", query, key, features)]
    result = run(
        query,
        key,
        features,
        w,
        c,
        bias,
        attn_mask,
        num_heads,
        check_diagonal(is_causal, diagonal),
        float(scale),
        float(eps),
    )
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out[0] if isinstance(weights, Tensor) else out.unbind()
