"""Layers that the models of several target tasks have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glomo.nn import Graphs, GraphTransfer, reverse
from glomo.nn.baselines import GraphSource


def padding(lengths: Tensor, size: int) -> Tensor:
    """`(B, size)`, true behind each length."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


class BiRNN(nn.Module):
    """A recurrent layer in each direction, the second over sequences reversed by true length: `(B, T, dim)` to
    `(B, T, out_dim)`. `kind` is `nn.GRU` or `nn.LSTM` (on a CPU PyTorch's LSTM takes a third of the time of its GRU).
    """

    def __init__(self, dim: int, out_dim: int, kind: type[nn.GRU] | type[nn.LSTM] = nn.GRU) -> None:
        super().__init__()
        self.rnns = nn.ModuleList(kind(dim, size, batch_first=True) for size in (out_dim - out_dim // 2, out_dim // 2))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        forward, backward = self.rnns
        return torch.cat([forward(x)[0], reverse(backward(reverse(x, lengths))[0], lengths)], -1)


class PairTransfer(nn.Module):
    """`GraphTransfer` on two texts: over both as one row, so that units of one read units of the other, or each alone.

    graph: as in `GraphTransfer`, whose further arguments are `mixing`.
    joined: whether graphs are of the row [first ; second], or of each text.
    """

    def __init__(self, graph: GraphSource, dim: int, joined: bool, **mixing: Any) -> None:
        super().__init__()
        self.transfer = GraphTransfer(graph, dim, **mixing)
        self.joined = joined
        self.out_dim = self.transfer.out_dim

    def forward(
        self,
        first: tuple[Tensor, Tensor],
        second: tuple[Tensor, Tensor],
        graph_inputs: Sequence[Sequence[Graphs]],
    ) -> tuple[Tensor, Tensor]:
        """Each text is (features `(B, T, dim)`, lengths `(B,)`), and `graph_inputs` what `graph.queries_keys` gave: of
        the row, or of the first text and of the second."""
        if not self.joined:
            return self.transfer(*first, graph_inputs[0]), self.transfer(*second, graph_inputs[1])
        (x, x_lengths), (y, y_lengths) = first, second
        device, sizes = x.device, (x.shape[1], y.shape[1])
        lengths = x_lengths + y_lengths
        place = torch.arange(int(lengths.max()), device=device)
        behind = place - x_lengths[:, None]  # of a place in the row, its place in the second text
        source = torch.where(behind < 0, place, sizes[0] + behind.clamp(max=sizes[1] - 1))
        row = torch.take_along_dim(torch.cat([x, y], 1), source[..., None], 1)
        mixed = self.transfer(row, lengths, graph_inputs[0])
        at = torch.arange(sizes[1], device=device) + x_lengths[:, None]
        back = torch.take_along_dim(mixed, at.clamp(max=mixed.shape[1] - 1)[..., None], 1)
        return mixed[:, : sizes[0]], back
