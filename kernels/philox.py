"""Philox4x32-10, the counter-based random numbers behind dropout (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), in plain PyTorch integer arithmetic.

Whether the pair (batch-head n, target t, source j) is kept depends on nothing but the seed and (n, t, j): every
backend, tiling and number of threads draws the same mask.

    counter = (j // 4, t, n mod 2^32, n // 2^32),  key = (seed mod 2^32, seed // 2^32)
    kept[n, t, j] = philox(counter, key)[j mod 4] >= round(dropout_p * 2^32)
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def _multiply_high_low(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * word. The 64-bit product of two 32-bit words does not fit a signed int64,
    so the constant goes in two 16-bit halves."""
    low_part = word * (constant & 0xFFFF)
    high_part = word * (constant >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32. Words are int64 tensors that hold 0 .. 2^32 - 1 and broadcast; seed is a 0-d int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        high0, low0 = _multiply_high_low(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, dropout_p: float, batch_heads: Tensor, rows: range, num_sources: int) -> Tensor:
    """Which pairs survive dropout.

    Args:
        seed: 0-d int64 tensor.
        dropout_p: probability of dropping, 0 <= dropout_p <= 1.
        batch_heads: int64 tensor of any shape with the flat batch-head indices n.
        rows: the targets t.
        num_sources: sources are j = 0 .. num_sources - 1.

    Returns:
        bool tensor (*batch_heads.shape, len(rows), num_sources), True where the pair is kept.
    """
    device = batch_heads.device
    n = batch_heads[..., None, None]
    t = torch.arange(rows.start, rows.stop, device=device)[:, None]
    groups = torch.arange((num_sources + 3) // 4, device=device)
    words = philox4x32((groups, t, n & _MASK32, n >> 32), seed)
    threshold = round(dropout_p * 2**32)
    kept = torch.stack(torch.broadcast_tensors(*words), dim=-1) >= threshold
    return kept.flatten(-2)[..., :num_sources]
