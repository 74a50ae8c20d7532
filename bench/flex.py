"""The ops written for FlexAttention, the fused kernel generator of PyTorch.

ReLU² normalisation is a softmax of `2 log relu(s + b)`: exp of that is r², and the softmax divides by its sum. It knows
no eps, and a trainable b is a captured buffer, whose gradient FlexAttention sums with atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

Mod = Callable[..., Tensor]
_flex: Any = torch.compile(flex_attention, dynamic=False)


def relu2_score_mod(bias: Tensor) -> Mod:
    """For a bias per target, (B, H, T). The inner `where` keeps log(0) and its infinite gradient out of the graph."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        s = score + bias[b, h, t]
        positive = s > 0
        return torch.where(positive, 2 * torch.log(torch.where(positive, s, 1.0)), -float("inf"))

    return score_mod


def earlier(strict: bool) -> Mod:
    """The mask of causal attention: sources before the target, or up to it."""
    if strict:
        return lambda b, h, t, j: t > j
    return lambda b, h, t, j: t >= j


def within(mask: Tensor) -> Mod:
    """The sources that a padding mask (B, 1, 1, T) allows."""
    return lambda b, h, t, j: mask[b, 0, 0, j]


def block_mask(mask_mod: Mod | None, size: int, device: torch.device, batch: int | None = None) -> Any:
    """What FlexAttention skips tiles by, made once and outside of the timing; None where nothing is masked."""
    return mask_mod and create_block_mask(mask_mod, batch, None, size, size, device=str(device))


def flex_softmax(mask: Any) -> Callable[..., Tensor]:
    return lambda query, key, value, *_: _flex(query, key, value, block_mask=mask)


def flex_relu2(mask: Any) -> Callable[..., Tensor]:
    """query, key, value (B, H, T, E) and a bias per target (B, H, T, 1)."""

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return _flex(query, key, value, score_mod=relu2_score_mod(bias[..., 0]), block_mask=mask, scale=1.0)

    return call


def flex_relu2_mix(mask: Any, num_heads: int) -> Callable[..., Tensor]:
    """One call a layer for the graphs, one for the running products: A_l (Λ_{l-1} F)."""
    attend = flex_relu2(mask)

    def call(
        query: Tensor, key: Tensor, bias: Tensor, features: Tensor, weights: Tensor, chains: Tensor | None = None
    ) -> Tensor:
        value = features[:, None].expand(-1, num_heads, -1, -1).contiguous()
        state, out = value, torch.zeros((), dtype=features.dtype, device=features.device)
        for first in range(0, query.size(1), num_heads):
            layer = slice(first, first + num_heads)
            q, k, b = query[:, layer], key[:, layer], bias[:, layer]
            out = out + torch.einsum("h,bhte->bte", weights[layer], attend(q, k, value, b))
            if chains is not None:
                state = attend(q, k, state, b)
                out = out + torch.einsum("h,bhte->bte", chains[layer], state)
        return out

    return call


def same_sequence(cu_seqlens: Tensor, then: Mod) -> Mod:
    """The mask of packed sequences: within one sequence, and `then`."""
    sizes = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    return lambda b, h, t, j: (sequence[t] == sequence[j]) & then(b, h, t, j)


def packed(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`attend` on (total, H, E), as one long sequence; a bias (total, H)."""

    def call(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        bias = [b.mT[None, :, :, None] for b in rest[:-1]]  # the last one is cu_seqlens
        return attend(*(x.transpose(0, 1)[None] for x in (query, key, value)), *bias)[0].transpose(0, 1)

    return call
