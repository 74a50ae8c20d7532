"""The context decoder: what makes features learn, by predicting the units that follow."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glomo.nn.embedded import PAD
from glomo.nn.losses import smoothed_cross_entropy


def sample_positions(lengths: Tensor, size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`(B, count)` positions per sequence, without replacement, among those that have a next unit (t < length - 1).

    A sequence with fewer of them fills up with positions that have no target and so count for nothing.
    """
    device = generator.device if generator is not None else lengths.device
    order = torch.rand(lengths.shape[0], size, generator=generator, device=device).to(lengths.device)
    has_next = torch.arange(size, device=lengths.device) < lengths[:, None] - 1
    return order.masked_fill(~has_next, -1.0).topk(min(count, size), dim=1).indices


def drawn_units(
    targets: Tensor, vocab_size: int, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A softmax over few units in the place of all: those that are targets, and `count` of the others, drawn without
    replacement, each of which stands for its share of them.

    .. code-block:: text

        sum_v exp(z_v)  ~  sum_{v a target} exp(z_v) + sum_{v drawn} exp(z_v + log(others / count))

    The right side's mean over the draws is the left side; with `count` of at least all others they are equal.

    Returns the units `(C,)`, of which the first is padding (unit 0), the targets as places among them, and what is
    added to their logits `(C,)`.

    Source: sampled softmax, Jean et al., ACL 2015; Bengio and Senecal, 2008.
    """
    device = generator.device if generator is not None else targets.device
    present = torch.zeros(vocab_size, dtype=torch.bool, device=targets.device)
    present[targets.flatten()] = True
    present[PAD] = True
    others = int(vocab_size - present.sum())
    order = torch.rand(vocab_size, generator=generator, device=device).to(targets.device).masked_fill(present, -1.0)
    extra = order.topk(min(count, others)).indices
    units = torch.cat([present.nonzero()[:, 0], extra])
    places = torch.empty(vocab_size, dtype=torch.int64, device=targets.device)
    places[units] = torch.arange(len(units), device=targets.device)
    added = torch.zeros(len(units), device=targets.device)
    added[len(units) - len(extra) :] = math.log(others / max(len(extra), 1)) if others else 0.0
    return units, places[targets], added


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
        drawn: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean cross-entropy (nats per predicted unit) over all pairs (t, d), 1 <= d <= horizon, with t + d < length.

        `start (B, P, dim)` starts the decoder at `positions (B, P)` of `tokens (B, T)`; `embedded (B, T, dim)` are the
        embedded tokens and `weight (V, dim)` the embedding. Zero when no pair counts. Padding (unit 0) has no share in
        the softmax. Few logits are alive at a time: see `glomo.nn.losses`. With `drawn`, the softmax is that of
        `drawn_units` (from `generator`).
        """
        ahead = positions[..., None] + torch.arange(1, horizon + 1, device=positions.device)  # (B, P, D)
        counted = ahead < lengths.to(positions.device)[:, None, None]
        index = ahead.clamp(max=max(tokens.shape[1] - 1, 0)).flatten(1)  # what it clamps is not counted
        targets = torch.take_along_dim(tokens, index, 1).view_as(ahead).masked_fill(~counted, PAD)
        known = torch.take_along_dim(embedded, index[..., None], 1).unflatten(1, ahead.shape[1:])
        inputs = torch.cat([torch.zeros_like(known[..., :1, :]), known[..., :-1, :]], dim=2)

        state = start.flatten(0, 1).expand(self.rnn.num_layers, -1, -1).contiguous()
        output, _ = self.rnn(inputs.flatten(0, 1), state)
        added = None
        if drawn:
            units, targets, added = drawn_units(targets, len(weight), drawn, generator)
            weight = weight[units]
        total = smoothed_cross_entropy(output, weight, targets.flatten(0, 1), pad=PAD, bias=added)
        return total / counted.sum().clamp(min=1)
