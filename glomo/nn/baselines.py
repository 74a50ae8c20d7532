"""Graphs that are not learned, behind the interface of `FrozenGraph`: the controls of every transfer result.

(The fourth control, a graph predictor that was never trained, is `glomo.nn.random_graph`.)
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from glomo.errors import UserError
from glomo.nn.graphs import Graphs


class GraphSource(Protocol):
    """What `GraphTransfer` needs to know of a graph: its numbers of directions, layers and heads."""

    @property
    def num_directions(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    def queries_keys(self, token_ids: Tensor, lengths: Tensor) -> tuple[Graphs, ...]: ...


class NoGraph(nn.Module):
    """No graph at all: `GraphTransfer` hands its features through."""

    num_directions = 0
    num_layers = 0
    num_heads = 0

    def queries_keys(self, token_ids: Tensor, lengths: Tensor) -> tuple[Graphs, ...]:
        return ()


class UniformGraph(nn.Module):
    """Every target reads all units of its sequence equally: the mean over the true length, padding left out."""

    num_directions = 1
    num_layers = 1
    num_heads = 1

    def queries_keys(self, token_ids: Tensor, lengths: Tensor) -> tuple[Graphs, ...]:
        batch, size = token_ids.shape
        nothing = torch.zeros(batch, 1, size, 1, device=token_ids.device)
        valid = torch.arange(size, device=token_ids.device) < lengths.to(token_ids.device)[:, None]
        # equal scores of one: A = 1 / length, exactly, with no eps
        return (Graphs(nothing, nothing, 1.0, valid[:, None, None], is_causal=False, eps=0.0),)


class BandGraph(nn.Module):
    """Every target reads its neighbours at distance 1 to `width` equally: those before it in one direction, those after
    it in the other."""

    num_directions = 2
    num_layers = 1
    num_heads = 1

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"the width of a band graph is {width}; it must be at least 1.")
        self.width = width

    def queries_keys(self, token_ids: Tensor, lengths: Tensor) -> tuple[Graphs, ...]:
        batch, size = token_ids.shape
        nothing = torch.zeros(batch, 1, size, 1, device=token_ids.device)
        position = torch.arange(size, device=token_ids.device)
        near = (position[:, None] - position <= self.width).float()[None]
        return tuple(Graphs(nothing, nothing, near, reversed=backward, eps=0.0) for backward in (False, True))


class MatchGraph(nn.Module):
    """Every target reads the other places of its own unit equally, before it and after it: the simplest link that
    depends on what is there. The row of a unit that stands once is zero, and so is that of unit 1, the unknown."""

    num_directions = 1
    num_layers = 1
    num_heads = 1

    def queries_keys(self, token_ids: Tensor, lengths: Tensor) -> tuple[Graphs, ...]:
        batch, size = token_ids.shape
        nothing = torch.zeros(batch, 1, size, 1, device=token_ids.device)
        known = (token_ids > 1) & (torch.arange(size, device=token_ids.device) < lengths.to(token_ids.device)[:, None])
        same = (token_ids[:, :, None] == token_ids[:, None]) & known[:, :, None] & known[:, None]
        same &= ~torch.eye(size, dtype=torch.bool, device=token_ids.device)
        return (Graphs(nothing, nothing, same.float()[:, None], is_causal=False, eps=0.0),)
