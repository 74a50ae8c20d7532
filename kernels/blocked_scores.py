"""The scores of a tile, the gradients that flow back through them, and dropout, for every blocked op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .arguments import accumulator_dtype
from .philox import keep_mask
from .tiles import Tile, add_to, batch_head_indices, pad_lead, take, take_flat, tiles


class Scores:
    """s = scale * <query_t, key_j> + bias[t, j], tile by tile; `fill` where the pair (t, j) is not allowed."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        attn_mask: Tensor | None,
        diagonal: int | None,
        scale: float,
        lead: torch.Size,
        fill: float = 0.0,
    ) -> None:
        rank = len(lead)
        self.query, self.key = pad_lead(query, rank), pad_lead(key, rank)
        self.bias = None if bias is None else pad_lead(bias, rank)
        self.attn_mask = None if attn_mask is None else pad_lead(attn_mask, rank)
        self.diagonal, self.scale, self.lead, self.fill = diagonal, scale, lead, fill
        self.dtype = accumulator_dtype(query.dtype)

    def tiles(self, per_pair: int = 1) -> Iterator[list[Tile]]:
        return tiles(self.lead, self.query.size(-2), self.key.size(-2), self.diagonal, per_pair)

    def keys(self, tile: Tile) -> Tensor:
        """All keys of a tile's batch-heads, (count, S, E): the same for every tile of a group."""
        return take_flat(self.key, tile, slice(None), self.dtype)

    def masked(self, tile: Tile, query: Tensor, keys: Tensor) -> Tensor:
        """s of a tile, (count, rows, sources), `fill` where the pair is not allowed; from its queries and keys."""
        scores = torch.bmm(query, keys[:, tile.sources].mT)
        if self.scale != 1.0:
            scores.mul_(self.scale)
        pairs = scores.view(*tile.lead_shape, *scores.shape[1:])
        if self.bias is not None:
            pairs.add_(take(self.bias, tile.lead, tile.rows, tile.sources))
        if self.attn_mask is not None:
            pairs.masked_fill_(~take(self.attn_mask, tile.lead, tile.rows, tile.sources), self.fill)
        if self.diagonal is not None:
            first_hidden = tile.rows.start + self.diagonal + 1  # of the tile's first target
            if first_hidden < tile.sources.stop:
                if self.fill == 0:
                    scores.tril_(first_hidden - 1)
                else:
                    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu_(first_hidden)
                    scores.masked_fill_(hidden, self.fill)
        return scores

    def queries(self, tile: Tile) -> Tensor:
        return take_flat(self.query, tile, tile.rows, self.dtype)


class ScoreGradients:
    """Sums dquery, dkey and dbias over the tiles, each only where it is needed."""

    def __init__(self, scores: Scores, needs: list[bool]) -> None:
        self.scores = scores
        dtype = scores.dtype

        def zeros(t: Tensor | None, needed: bool) -> Tensor | None:
            return torch.zeros(t.shape, dtype=dtype, device=t.device) if needed and t is not None else None

        self.dquery, self.dkey = zeros(scores.query, needs[0]), zeros(scores.key, needs[1])
        self.dbias = zeros(scores.bias, needs[2])

    def add(self, tile: Tile, query: Tensor, keys: Tensor, dscores: Tensor) -> None:
        """From d(loss)/d(s), (count, rows, sources); dscores may be overwritten."""
        if self.dbias is not None:
            add_to(self.dbias, tile, (tile.rows, tile.sources), dscores)
        if self.scores.scale != 1.0:
            dscores.mul_(self.scores.scale)
        if self.dquery is not None:
            add_to(self.dquery, tile, (tile.rows, slice(None)), torch.bmm(dscores, keys[:, tile.sources]))
        if self.dkey is not None:
            add_to(self.dkey, tile, (tile.sources, slice(None)), torch.bmm(dscores.mT, query))

    def results(self, query: Tensor, key: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Gradients in the shapes and dtypes of the inputs; empty tensors where none is needed."""
        return [
            gradient_like(query, self.dquery),
            gradient_like(key, self.dkey),
            gradient_like(bias, self.dbias, query),
        ]


def gradient_like(t: Tensor | None, gradient: Tensor | None, fallback: Tensor | None = None) -> Tensor:
    """The gradient in t's shape and dtype, or an empty tensor (a custom op cannot return None)."""
    if t is None or gradient is None:
        source = t if t is not None else fallback
        assert source is not None
        return source.new_empty(0)
    return gradient.reshape(t.shape).to(t.dtype)


class Dropout:
    """The kept pairs of a tile, times 1 / (1 - p)."""

    def __init__(self, seed: Tensor | None, dropout_p: float, lead: torch.Size, first_batch_head: int = 0) -> None:
        self.seed, self.dropout_p = seed, dropout_p
        if seed is not None:
            self.batch_heads = batch_head_indices(lead, seed.device) + first_batch_head

    def apply_(self, weights: Tensor, tile: Tile) -> Tensor:
        """Drops from weights (count, rows, sources) in place."""
        if self.seed is None:
            return weights
        if self.dropout_p == 1.0:
            return weights.zero_()
        n = self.batch_heads[tile.lead].reshape(-1)
        keep = keep_mask(self.seed, self.dropout_p, n, range(tile.rows.start, tile.rows.stop), weights.size(-1))
        return weights.mul_(keep).div_(1 - self.dropout_p)


def denominator(normalizer: Tensor, eps: float) -> Tensor:
    """Z + eps, and 1 for a dead row, whose squares are all 0."""
    return (normalizer + eps).masked_fill_(normalizer == 0, 1)
