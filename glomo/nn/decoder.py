"""The context decoder: what makes features learn, by predicting the units that follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_IGNORED = -100
_CHUNK_LOGITS = 2**24
"""Logits alive at a time (64 MiB in fp32)."""


def sample_positions(lengths: Tensor, size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`(B, count)` positions per sequence, without replacement, among those that have a next unit (t < length - 1).

    A sequence with fewer of them fills up with positions that have no target and so count for nothing.
    """
    device = generator.device if generator is not None else lengths.device
    order = torch.rand(lengths.shape[0], size, generator=generator, device=device).to(lengths.device)
    has_next = torch.arange(size, device=lengths.device) < lengths[:, None] - 1
    return order.masked_fill(~has_next, -1.0).topk(min(count, size), dim=1).indices


class ContextDecoder(nn.Module):
    """A GRU that starts from a feature vector f_t (in all its layers) and predicts the next units x_{t+1..t+D}.

    Its first input is zero, then the true units (teacher forcing): step d predicts x_{t+d} having read
    x_{t+1..t+d-1}. The logits are the products with the embedding of the units, which is tied.
    """

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(dim, dim, layers, batch_first=True)

    def forward(
        self,
        start: Tensor,
        positions: Tensor,
        horizon: int,
        tokens: Tensor,
        lengths: Tensor,
        embedded: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """Mean cross-entropy (nats per predicted unit) over all pairs (t, d), 1 <= d <= horizon, with t + d < length.

        `start (B, P, dim)` starts the decoder at `positions (B, P)` of `tokens (B, T)`; `embedded (B, T, dim)` are the
        embedded tokens and `weight (V, dim)` the embedding. Zero when no pair counts. Long batches go in chunks, whose
        logits are computed again in the backward pass, so that few logits are alive.
        """
        ahead = positions[..., None] + torch.arange(1, horizon + 1, device=positions.device)  # (B, P, D)
        counted = ahead < lengths.to(positions.device)[:, None, None]
        index = ahead.clamp(max=max(tokens.shape[1] - 1, 0)).flatten(1)  # what it clamps is not counted
        targets = torch.take_along_dim(tokens, index, 1).view_as(ahead).masked_fill(~counted, _IGNORED)
        known = torch.take_along_dim(embedded, index[..., None], 1).unflatten(1, ahead.shape[1:])
        inputs = torch.cat([torch.zeros_like(known[..., :1, :]), known[..., :-1, :]], dim=2)

        start, inputs, targets = start.flatten(0, 1), inputs.flatten(0, 1), targets.flatten(0, 1)
        rows = max(1, _CHUNK_LOGITS // (horizon * weight.shape[0]))
        total = start.new_zeros((), dtype=torch.float32 if start.dtype != torch.float64 else None)
        for i in range(0, start.shape[0], rows):
            chunk = (start[i : i + rows], inputs[i : i + rows], targets[i : i + rows], weight)
            if torch.is_grad_enabled() and start.shape[0] > rows:
                total = total + checkpoint(self._chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False)
            else:
                total = total + self._chunk_loss(*chunk)
        return total / counted.sum().clamp(min=1)

    def _chunk_loss(self, start: Tensor, inputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        state = start.expand(self.rnn.num_layers, -1, -1).contiguous()
        output, _ = self.rnn(inputs, state)
        logits = F.linear(output, weight).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=_IGNORED, reduction="sum")
