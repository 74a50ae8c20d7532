"""What tells a Transformer where a unit stands: sinusoids or learned vectors added to the embedding, or a number for
every distance added to the scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim) with ``[t, 2i] = sin(t / 10000^(2i/dim))`` and ``[t, 2i+1] = cos`` of the same.

    Source: Vaswani et al., NeurIPS 2017, section 3.5.
    """
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).float()


class Positions(nn.Module):
    """Adds to ``x (B, T, dim)`` the vectors of the positions ``offset`` to ``offset + T - 1``.

    kind: "sinusoidal", "learned", or "relative", which adds nothing here.
    """

    def __init__(self, kind: str, max_length: int, dim: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.table: Tensor | None
        if kind == "sinusoidal":
            self.register_buffer("table", sinusoids(max_length, dim), persistent=False)
        else:
            self.table = nn.Parameter(torch.randn(max_length, dim) * dim**-0.5) if kind == "learned" else None

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        end = offset + x.size(1)
        if end > self.max_length:
            raise ValueError(
                f"A sequence has {end} units, its end included; the model takes {self.max_length} at most."
            )
        return x if self.table is None else x + self.table[offset:end].to(x.dtype)


class RelativeBias(nn.Module):
    """A learned number for every head and every distance j - t, beyond ``max_distance`` that of the farthest:
    ``(T, S) -> (heads, T, S)``, to be added to the scores.

    Source: the clipping of Shaw, Uszkoreit and Vaswani, NAACL 2018; a number in place of their vector as in Raffel et
    al., JMLR 2020.
    """

    def __init__(self, heads: int, max_distance: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.zeros(2 * max_distance + 1, heads))

    def forward(self, targets: int, sources: int, offset: int = 0) -> Tensor:
        """offset: the position of the first target."""
        device = self.table.device
        t, j = torch.arange(targets, device=device) + offset, torch.arange(sources, device=device)
        distance = (j - t[:, None]).clamp(-self.max_distance, self.max_distance)
        return self.table[distance + self.max_distance].movedim(-1, 0)
