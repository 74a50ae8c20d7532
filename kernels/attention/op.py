"""attention and its packed form: argument checks, the registered ops, the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu_attention
from ..arguments import (
    HeadGroups,
    autocast_cast,
    broadcast_lead,
    check_broadcastable,
    check_number,
    check_probability,
    check_qk,
    check_same_device,
    dropout_seed,
)
from ..backend import select_backend
from ..registration import differentiable_op, fake_packed_rows, fake_rows, saving
from ..varlen import check_varlen, split_heads
from . import blocked, cpu, reference, triton

_blocked = differentiable_op(
    "attention_blocked",
    blocked.attention_forward,
    blocked.attention_backward,
    fake_rows,
    differentiable=("query", "key", "value", "attn_mask"),
)

_cpu = differentiable_op(
    "attention_cpu",
    cpu.attention_forward,
    cpu.attention_backward,
    cpu_attention.fake,
    differentiable=("query", "key", "value", "attn_mask"),
    saved_outputs=3,
    fake_gradients=cpu_attention.fake_gradients,
)

_blocked_varlen = differentiable_op(
    "attention_varlen_blocked",
    blocked.attention_varlen_forward,
    blocked.attention_varlen_backward,
    fake_packed_rows,
    differentiable=("query", "key", "value"),
)

_cpu_varlen = differentiable_op(
    "attention_varlen_cpu",
    cpu.attention_varlen_forward,
    cpu.attention_varlen_backward,
    cpu_attention.fake_packed,
    differentiable=("query", "key", "value"),
    saved_outputs=2,
)


def _with_statistics(fake):
    """The fake version with what Triton's kernels save: the sum of exponentials and the largest score of each row."""

    def outputs(query, key, value, *_):
        out, lse = fake(query, key, value)
        return out, lse, torch.empty_like(lse), torch.empty_like(lse)

    return outputs


_triton = differentiable_op(
    "attention_triton",
    triton.attention_forward,
    triton.attention_backward,
    _with_statistics(fake_rows),
    differentiable=("query", "key", "value", "attn_mask"),
    saved_outputs=2,
)

_triton_varlen = differentiable_op(
    "attention_varlen_triton",
    triton.attention_varlen_forward,
    triton.attention_varlen_backward,
    _with_statistics(fake_packed_rows),
    differentiable=("query", "key", "value"),
    saved_outputs=2,
)

_BACKENDS = {
    "reference": reference.attention,
    "blocked": _blocked,
    "cpu": saving(cpu_attention.laid_out(_cpu)),
    "triton": _triton,
}
_VARLEN_BACKENDS = {
    "reference": reference.attention_varlen,
    "blocked": _blocked_varlen,
    "cpu": saving(_cpu_varlen),
    "triton": _triton_varlen,
}


def _check_mask(attn_mask: Tensor | None, query: Tensor) -> None:
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a bool or floating tensor, not {type(attn_mask).__name__}.")
    if attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise TypeError(
            f"attn_mask is {attn_mask.dtype}, but must be bool, or of the query's dtype {query.dtype} or fp32."
        )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled-dot-product attention; argument for argument ``torch.nn.functional.scaled_dot_product_attention``.

    .. code-block:: text

        s[t, j] = scale * <query_t, key_j> + attn_mask[t, j]
        out[t]  = sum_j softmax_j(s[t, :])[j] value_j

    A target that may read nothing gives a zero row, value and gradient.

    Args:
        query: (..., H, T, E), floating point, any strides, any leading dimensions.
        key: (..., H, S, E), of the query's dtype; leading dimensions broadcast.
        value: (..., H, S, Ev).
        attn_mask: broadcastable to (..., H, T, S); bool, True = may be read, or floating, added to the scores
            (it gets its gradient).
        dropout_p: probability of dropping a weight; applied whenever it is not 0, as in PyTorch.
        is_causal: target t reads the sources j <= t only (top-left aligned); with attn_mask, where only some
            of PyTorch's backends take both, those of them that the mask allows.
        scale: factor of the products; None means 1 / sqrt(E).
        enable_gqa: query has H heads, key and value Hk heads, H a multiple of Hk.
        return_lse: also return the log of the sum of exponentials (..., H, T), in fp32 (fp64 for fp64 inputs),
            differentiable; -inf where a target may read nothing.

    Returns:
        out (..., H, T, Ev) of the query's dtype, or (out, lse).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape; the sentence names it.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
    """
    query, key, value = autocast_cast(query, key, value)
    check_qk(query, key, value)
    _check_mask(attn_mask, query)
    check_same_device(query, attn_mask=attn_mask)
    check_probability(dropout_p)
    groups = HeadGroups(query, key, value) if enable_gqa else None
    if groups:
        query, key, value = groups.split_query(query), groups.split_key(key), groups.split_key(value)
        attn_mask = groups.split_pairs("attn_mask", attn_mask)
    if attn_mask is not None:
        lead = broadcast_lead(query=query, key=key, value=value)
        check_broadcastable("attn_mask", attn_mask, (*lead, query.size(-2), key.size(-2)))
    else:
        broadcast_lead(query=query, key=key, value=value)
    run = _BACKENDS[select_backend("attention", query, key, value)]
    out, lse, *_ = run(
        query,
        key,
        value,
        attn_mask,
        dropout_seed(dropout_p, query.device),
        float(dropout_p),
        0 if is_causal else None,
        _scale(scale, query),
    )
    if groups:
        out, lse = out.flatten(-4, -3), lse.flatten(-3, -2)
    return (out, lse) if return_lse else out


def _scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return max(query.size(-1), 1) ** -0.5
    check_number("scale", scale)
    return float(scale)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`glomo.attention` for a packed batch of sequences of different lengths, without padding.

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
        dropout_p, is_causal, scale, enable_gqa, return_lse: as in attention. Dropout is that of the padded batch:
            the flat batch-head index is i * H + h, t and j count within the sequence.

    Returns:
        out (total_q, H, Ev), or (out, lse) with lse (total_q, H).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or content; the sentence names it.
    """
    query, key, value = autocast_cast(query, key, value)
    check_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, enable_gqa)
    check_probability(dropout_p)
    scale = _scale(scale, query)
    if enable_gqa:
        query, key, value, _ = split_heads(query, key, value, None)
    run = _VARLEN_BACKENDS[select_backend("attention_varlen", query, key, value)]
    out, lse, *_ = run(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        dropout_seed(dropout_p, query.device),
        float(dropout_p),
        0 if is_causal else None,
        scale,
    )
    if enable_gqa:
        out, lse = out.flatten(1, 2), lse.flatten(1, 2)
    return (out, lse) if return_lse else out
