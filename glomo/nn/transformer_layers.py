"""The layers of a Transformer: attention with a cache, a GLoMo graph in its place, and the stack of an encoder or a
decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.errors import UserError
from glomo.nn.attention import attend
from glomo.nn.baselines import GraphSource
from glomo.nn.graphs import Graphs
from glomo.nn.positions import Positions, RelativeBias
from glomo.nn.transfer import GraphTransfer
from glomo.nn.transformer_config import TransformerConfig


class Context(NamedTuple):
    """What an attention reads besides its own input."""

    allowed: Tensor | None = None
    """Bool, (B, 1, 1, S): False for padding."""
    bias: Tensor | None = None
    """(heads, T, S), added to the scores."""
    causal: bool = False
    memory: Tensor | None = None
    """(B, S, dim), of an attention over a memory."""
    lengths: Tensor | None = None
    graphs: Sequence[Graphs] = ()
    """`graph.queries_keys(tokens, lengths)`, of graph layers."""

    def mask(self) -> Tensor | None:
        """What may be read and what is added to the scores, as one."""
        if self.bias is None or self.allowed is None:
            return self.allowed if self.bias is None else self.bias
        return self.bias.masked_fill(~self.allowed, float("-inf"))


class Cache:
    """What a decoder's layer has computed so far: keys and values of its own units, and of the memory."""

    def __init__(self) -> None:
        self.own: tuple[Tensor, Tensor] | None = None
        self.memory: tuple[Tensor, Tensor] | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Everything so far, the new units at the end."""
        if self.own is not None:
            key, value = torch.cat([self.own[0], key], -2), torch.cat([self.own[1], value], -2)
        self.own = key, value
        return self.own

    def select(self, rows: Tensor) -> None:
        """Rows of the batch, in a new order."""
        self.own = None if self.own is None else (self.own[0][rows], self.own[1][rows])
        self.memory = None if self.memory is None else (self.memory[0][rows], self.memory[1][rows])


class Attention(nn.Module):
    """Multi-head attention of a sequence over itself, or over a memory.

    activation: "softmax", or "relu2", which adds a learned number a head to the scores.
    """

    def __init__(self, config: TransformerConfig, activation: str = "softmax", over_memory: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.dim, config.dim) if over_memory else None
        self.packed = nn.Linear(config.dim, (2 if over_memory else 3) * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.affinity_bias = nn.Parameter(torch.ones(config.heads, 1, 1)) if activation == "relu2" else None

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        q, k, v = self._over_memory(x, context, cache) if self.query else self._over_itself(x, cache)
        mask, dropout_p = context.mask(), self.dropout if self.training else 0.0
        out = attend(q, k, v, mask, dropout_p, context.causal, self.affinity_bias)
        return self.out(out.transpose(1, 2).flatten(-2))

    def _over_itself(self, x: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._heads(self.packed(x)).chunk(3, -1)
        return (q, *cache.extend(k, v)) if cache else (q, k, v)

    def _over_memory(self, x: Tensor, context: Context, cache: Cache | None) -> tuple[Tensor, Tensor, Tensor]:
        assert self.query is not None
        known = cache.memory if cache else None
        if known is None:
            k, v = self._heads(self.packed(context.memory)).chunk(2, -1)
            known = k, v
            if cache:
                cache.memory = known
        return self._heads(self.query(x)), *known

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, n * dim) -> (B, heads, T, n * dim / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GraphAttention(nn.Module):
    """A GLoMo graph's mixture in the place of a learned attention: W [M_1 x ; M_2 x] over the graph's two directions,
    the mixtures' weights learned."""

    def __init__(self, config: TransformerConfig, graph: GraphSource | None) -> None:
        super().__init__()
        if graph is None:
            raise UserError("model.encoder_attention names a graph; the Transformer must be given one.")
        self.transfer = GraphTransfer(graph, config.dim, num_mixtures=1, fusion="none")
        self.out = nn.Linear(self.transfer.out_dim, config.dim)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        assert context.lengths is not None
        return self.out(self.transfer(x, context.lengths, context.graphs))


class Layer(nn.Module):
    """Self-attention, attention over a memory where there is one, and feed-forward, each with dropout, a residual and
    LayerNorm around it."""

    def __init__(
        self, config: TransformerConfig, kind: str, over_memory: bool, graph: GraphSource | None = None
    ) -> None:
        super().__init__()
        self.attention = GraphAttention(config, graph) if kind == "graph" else Attention(config, kind)
        self.over_memory = Attention(config, over_memory=True) if over_memory else None
        self.inner, self.outer = nn.Linear(config.dim, config.ff), nn.Linear(config.ff, config.dim)
        self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in range(2 + over_memory))
        self.dropout, self.post = config.dropout, config.norm == "post"

    def forward(self, x: Tensor, own: Context, memory: Context | None = None, cache: Cache | None = None) -> Tensor:
        x = self._add(x, self.norms[0], lambda h: self.attention(h, own, cache))
        over_memory = self.over_memory
        if over_memory is not None and memory is not None:
            x = self._add(x, self.norms[1], lambda h: over_memory(h, memory, cache))
        return self._add(x, self.norms[-1], lambda h: self.outer(F.relu(self.inner(h))))

    def _add(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.post:
            return norm(x + F.dropout(sublayer(x), self.dropout, self.training))
        return x + F.dropout(sublayer(norm(x)), self.dropout, self.training)


class Stack(nn.Module):
    """The layers of an encoder, a decoder or a language model, over embedded units."""

    def __init__(
        self,
        config: TransformerConfig,
        kinds: Sequence[str],
        over_memory: bool = False,
        graph: GraphSource | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, kind, over_memory, graph) for kind in kinds)
        self.positions = Positions(config.positions, config.max_length, config.dim)
        relative = config.positions == "relative"
        self.relative = RelativeBias(config.heads, config.max_distance) if relative else None
        self.norm = nn.LayerNorm(config.dim) if config.norm == "pre" else nn.Identity()
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        own: Context,
        memory: Context | None = None,
        caches: Sequence[Cache] | None = None,
        offset: int = 0,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """`x (B, T, dim)` at the positions from `offset` on; with `caches`, x is what follows the units in them.
        `outputs` takes x with its positions, and what each layer makes of it."""
        x = F.dropout(self.positions(x, offset), self.dropout, self.training)
        if self.relative is not None:
            own = own._replace(bias=self.relative(x.size(1), offset + x.size(1), offset))
        if outputs is not None:
            outputs.append(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, own, memory, caches[i] if caches else None)
            if outputs is not None:
                outputs.append(x)
        x = self.norm(x)
        if outputs is not None:
            outputs[-1] = x
        return x
