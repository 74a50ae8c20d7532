"""relu2_attention and its packed form: argument checks, the registered ops, the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu_attention
from ..arguments import (
    EPS,
    HeadGroups,
    autocast_cast,
    bias_tensor,
    broadcast_lead,
    check_bool_mask,
    check_broadcastable,
    check_diagonal,
    check_eps,
    check_number,
    check_probability,
    check_qk,
    check_same_device,
    dropout_seed,
)
from ..backend import select_backend
from ..registration import differentiable_op, fake_packed_rows, fake_rows, saving
from ..varlen import check_varlen, split_heads, varlen_bias
from . import blocked, cpu, reference, triton

_blocked = differentiable_op(
    "relu2_attention_blocked",
    blocked.relu2_attention_forward,
    blocked.relu2_attention_backward,
    fake_rows,
    differentiable=("query", "key", "value", "bias"),
)


def _fake_triton(query, key, value, bias, *rest):
    out, normalizer = fake_rows(query, key, value)
    return out, normalizer, query.new_empty(triton.active_shape(out.shape[:-2], query, key, bias), dtype=torch.int8)


_triton = differentiable_op(
    "relu2_attention_triton",
    triton.relu2_attention_forward,
    triton.relu2_attention_backward,
    _fake_triton,
    differentiable=("query", "key", "value", "bias"),
    saved_outputs=1,
)


_cpu = differentiable_op(
    "relu2_attention_cpu",
    cpu.relu2_attention_forward,
    cpu.relu2_attention_backward,
    lambda *inputs: cpu_attention.fake(*inputs)[:4],
    differentiable=("query", "key", "value", "bias"),
    saved_outputs=2,
    fake_gradients=cpu_attention.fake_gradients,
)


_cpu_varlen = differentiable_op(
    "relu2_attention_varlen_cpu",
    cpu.relu2_attention_varlen_forward,
    cpu.relu2_attention_varlen_backward,
    lambda *inputs: cpu_attention.fake_packed(*inputs)[:3],
    differentiable=("query", "key", "value", "bias"),
    saved_outputs=1,
)

_blocked_varlen = differentiable_op(
    "relu2_attention_varlen_blocked",
    blocked.relu2_attention_varlen_forward,
    blocked.relu2_attention_varlen_backward,
    fake_packed_rows,
    differentiable=("query", "key", "value", "bias"),
)

_triton_varlen = differentiable_op(
    "relu2_attention_varlen_triton",
    triton.relu2_attention_varlen_forward,
    triton.relu2_attention_varlen_backward,
    fake_packed_rows,
    differentiable=("query", "key", "value", "bias"),
)


_BACKENDS = {
    "reference": reference.relu2_attention,
    "blocked": _blocked,
    "cpu": saving(cpu_attention.laid_out(_cpu)),
    "triton": _triton,
}
_VARLEN_BACKENDS = {
    "reference": reference.relu2_attention_varlen,
    "blocked": _blocked_varlen,
    "cpu": saving(_cpu_varlen),
    "triton": _triton_varlen,
}


def relu2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: float | Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    diagonal: int = 0,
    scale: float = 1.0,
    eps: float = EPS,
    enable_gqa: bool = False,
    return_normalizer: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """ReLU²-normalised attention: the graph of :func:`glomo.relu2_affinity` times the value, never in memory.

    .. code-block:: text

        s[t, j] = scale * <query_t, key_j> + bias[t, j]
        r[t, j] = relu(s[t, j])   on allowed pairs, 0 elsewhere
        Z[t]    = sum_j r[t, j]²
        out[t]  = sum_j r[t, j]² value_j / (Z[t] + eps)

    A row whose Z is 0 (in fp32, or fp64 for fp64 inputs) gives a zero row, value and gradient, never NaN. Scores,
    squares and sums are fp32, so fp16 neither overflows nor underflows.

    Args:
        query: (..., H, T, E), floating point, any strides, any leading dimensions.
        key: (..., H, S, E), of the query's dtype; leading dimensions broadcast.
        value: (..., H, S, Ev); Ev need not equal E.
        bias: a float, or a tensor of the query's dtype or fp32 that broadcasts to (..., H, T, S): scalar, per head,
            per target (..., T, 1), per source (..., 1, S) or full. It gets its gradient in its own shape and dtype.
            GLoMo's query-dependent threshold is ``bias = -threshold``.
        attn_mask: bool, broadcastable to (..., H, T, S); True = may be read, as in PyTorch's SDPA.
        dropout_p: probability of dropping a normalised weight (Z is before dropout). The mask is a Philox function of
            a seed from the device's default generator and of (batch-head, t, j): the same on every backend. As in
            SDPA it is applied whenever it is not 0: pass ``dropout_p=p if self.training else 0.0``.
        is_causal: target t reads the sources j <= t + diagonal only (``torch.tril``, top-left aligned).
        diagonal: with is_causal; -1 means strictly earlier sources, as in GLoMo.
        scale: factor of the products (no 1/sqrt(E) by default, as published).
        eps: added to Z, >= 0; 0 is allowed and exact.
        enable_gqa: query has H heads, key and value Hk heads, H a multiple of Hk.
        return_normalizer: also return Z (..., H, T), without eps, in fp32 (fp64 for fp64 inputs), differentiable.
            Results over slices of the sources add up through it.

    Returns:
        out (..., H, T, Ev) of the query's dtype, or (out, Z).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape; the sentence names it.

    Example:
        >>> query, key, value = torch.randn(3, 2, 8, 128, 64).unbind()
        >>> out = glomo.relu2_attention(query, key, value, bias=1.0, is_causal=True, diagonal=-1)
        >>> out.shape
        torch.Size([2, 8, 128, 64])

    Source: the affinity of Yang et al., "GLoMo: Unsupervised Learning of Transferable Relational Graphs", NeurIPS 2018.
    """
    query, key, value = autocast_cast(query, key, value)
    check_qk(query, key, value)
    bias = bias_tensor(bias, query)
    check_bool_mask(attn_mask)
    check_same_device(query, bias=bias, attn_mask=attn_mask)
    check_eps(eps)
    check_number("scale", scale)
    check_probability(dropout_p)
    groups = HeadGroups(query, key, value) if enable_gqa else None
    if groups:
        query, key, value = groups.split_query(query), groups.split_key(key), groups.split_key(value)
        bias, attn_mask = groups.split_pairs("bias", bias), groups.split_pairs("attn_mask", attn_mask)
    pairs = (*broadcast_lead(query=query, key=key, value=value), query.size(-2), key.size(-2))
    for name, t in (("bias", bias), ("attn_mask", attn_mask)):
        if t is not None:
            check_broadcastable(name, t, pairs)
    run = _BACKENDS[select_backend("relu2_attention", query, key, value)]
    out, normalizer, *_ = run(
        query,
        key,
        value,
        bias,
        attn_mask,
        dropout_seed(dropout_p, query.device),
        float(dropout_p),
        check_diagonal(is_causal, diagonal),
        float(scale),
        float(eps),
    )
    if groups:
        out, normalizer = out.flatten(-4, -3), normalizer.flatten(-3, -2)
    return (out, normalizer) if return_normalizer else out


def relu2_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: float | Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    diagonal: int = 0,
    scale: float = 1.0,
    eps: float = EPS,
    enable_gqa: bool = False,
    return_normalizer: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`glomo.relu2_attention` for a packed batch of sequences of different lengths, without padding.

    Sequence i has the targets ``cu_seqlens_q[i] : cu_seqlens_q[i + 1]`` and the sources
    ``cu_seqlens_k[i] : cu_seqlens_k[i + 1]``; it reads nothing of its neighbours, and is_causal counts within it.

    Args:
        query: (total_q, H, E).
        key: (total_k, H, E).
        value: (total_k, H, Ev).
        cu_seqlens_q: (batch + 1,) int32 or int64 on the query's device, rising from 0 to total_q.
        cu_seqlens_k: the same for the sources, rising from 0 to total_k.
        max_seqlen_q: length of the longest sequence of targets, or more.
        max_seqlen_k: length of the longest sequence of sources, or more.
        bias: a float, (H,), per target (total_q, H), or per source (total_k, H), which where total_q = total_k must
            be given as (1, total_k, H).
        dropout_p, is_causal, diagonal, scale, eps, enable_gqa, return_normalizer: as in relu2_attention. Dropout is
            that of the padded batch: the flat batch-head index is i * H + h, t and j count within the sequence.

    Returns:
        out (total_q, H, Ev), or (out, Z) with Z (total_q, H).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or content; the sentence names it.
    """
    query, key, value = autocast_cast(query, key, value)
    check_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, enable_gqa)
    bias = bias_tensor(bias, query)
    check_same_device(query, bias=bias)
    check_eps(eps)
    check_number("scale", scale)
    check_probability(dropout_p)
    bias = varlen_bias(bias, query, key)
    if enable_gqa:
        query, key, value, bias = split_heads(query, key, value, bias)
    run = _VARLEN_BACKENDS[select_backend("relu2_attention_varlen", query, key, value)]
    out, normalizer, *_ = run(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        bias,
        dropout_seed(dropout_p, query.device),
        float(dropout_p),
        check_diagonal(is_causal, diagonal),
        float(scale),
        float(eps),
    )
    if enable_gqa:
        out, normalizer = out.flatten(1, 2), normalizer.flatten(1, 2)
    return (out, normalizer) if return_normalizer else out
