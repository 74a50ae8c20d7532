"""The definition of relu2_affinity in plain PyTorch. It keeps whole T x S tensors; autograd gives its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import accumulator_dtype, without_autocast


def allowed_pairs(query: Tensor, key: Tensor, attn_mask: Tensor | None, diagonal: int | None) -> Tensor | None:
    """Bool tensor, broadcastable to (..., T, S), of the pairs that may be read; None where all may.

    diagonal None means not causal; otherwise target t reads sources j <= t + diagonal, as torch.tril keeps them.
    """
    if diagonal is None:
        return attn_mask
    causal = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril(diagonal)
    return causal if attn_mask is None else causal & attn_mask


def affinity_and_normalizer(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """A (..., T, S) and Z (..., T), both in the accumulator's dtype. Leading dimensions broadcast.

    s = scale * <query_t, key_j> + bias;  r = relu(s) on allowed pairs, else 0;  Z = sum_j r²;  A = r² / (Z + eps).
    A row with Z = 0 is a zero row, value and gradient, also with eps = 0.
    """
    dtype = accumulator_dtype(query.dtype)
    with without_autocast(query.device):
        scores = query.to(dtype) @ key.to(dtype).mT * scale
        if bias is not None:
            scores = scores + bias
        rectified = scores.relu()
        allowed = allowed_pairs(query, key, attn_mask, diagonal)
        if allowed is not None:
            rectified = rectified.where(allowed, 0)
        squares = rectified.square()
        normalizer = squares.sum(-1)
        denominator = torch.where(normalizer == 0, 1, normalizer + eps)
        return squares / denominator[..., None], normalizer


def relu2_affinity(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> Tensor:
    return affinity_and_normalizer(query, key, bias, attn_mask, diagonal, scale, eps)[0].to(query.dtype)
