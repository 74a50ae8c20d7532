"""Graphs in factored form: what the ops need to apply a graph without ever holding it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.kernels import attention, graph_mix, relu2_affinity, relu2_attention, relu2_graph_mix
from glomo.nn.precision import wide


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence of `x (B, T, ...)` backwards over its true length; the padding behind it stays where it is.

    Its own inverse. (Flipping the padded tensor instead would put the padding in front, where it is read.)
    Raises ValueError for lengths on the CPU that are above T; on a GPU the check would wait for the device.
    """
    if lengths.device.type == "cpu" and lengths.numel() and not torch.compiler.is_compiling():
        longest = int(lengths.max())
        if longest > x.shape[1]:
            raise ValueError(f"lengths has {longest}, but the sequences of x are only {x.shape[1]} long")
    position = torch.arange(x.shape[1], device=x.device)
    length = lengths.to(x.device)[:, None]
    index = torch.where(position < length, length - 1 - position, position)
    return torch.take_along_dim(x, index.reshape(index.shape + (1,) * (x.dim() - 2)), dim=1)


def _before(units: Tensor) -> Tensor:
    """The unit that precedes each, along the last dimension; the first is preceded by -1, which no unit is."""
    return F.pad(units, (1, 0), value=-1)[..., :-1]


def _narrowed(bias: Tensor, dtype: torch.dtype) -> Tensor:
    return bias if bias.dtype == torch.float32 else bias.to(dtype)  # an fp32 bias goes with every dtype


class GraphStatistics(NamedTuple):
    """Counts over a batch; `share_zero` and `share_dead` belong side by side, since a dead row is all zeros."""

    pairs: int
    """Pairs (target, source) that the graphs may use, over all graphs."""
    zero_pairs: int
    rows: int
    """Targets that have a source, over all graphs."""
    dead_rows: int

    @property
    def share_zero(self) -> float:
        return self.zero_pairs / max(self.pairs, 1)

    @property
    def share_dead(self) -> float:
        return self.dead_rows / max(self.rows, 1)


@dataclass(frozen=True)
class Graphs:
    """The N = layers * heads graphs of one direction (layer-major), as queries and keys.

    Row t of a graph holds the weights with which target t reads its sources j:
    `A[t, j] = r[t, j]^2 / (sum_j r[t, j]^2 + eps)`, `r = relu(scale * <query_t, key_j> + bias[t, j])`.
    With `is_causal` only strictly earlier sources j < t are read. Padding then needs no mask: it stands at the end,
    so no unit of the sequence reads it. Rows of padded targets are finite and mean nothing.
    """

    query: Tensor
    """`(B, N, T, E)`"""
    key: Tensor
    """`(B, N, T, E)`"""
    bias: Tensor | float
    """A number, or a tensor that broadcasts to `(B, N, T, T)` and has at least its last three dimensions."""
    attn_mask: Tensor | None = None
    """Bool `(B, 1, 1, T)`, True where a source may be read."""
    num_heads: int = 1
    is_causal: bool = True
    reversed: bool = False
    """True where T runs from the end of each sequence to its start: features go through `reverse` before and after."""
    activation: str = "relu2"
    """`relu2`, or `softmax` of the same scores (an ablation; a row without sources is zero there too)."""
    scale: float = 1.0
    eps: float = 1e-6
    units: Tensor | None = None
    """`(B, T)`, the units that `equal` compares."""
    equal: Tensor | None = None
    """`(2, N)`, further terms of the bias: `equal[0]` where x_j = x_t, and `equal[1]` where x_{j-1} = x_t (in the
    direction's order), x_t other than the unknown unit. The ops are then given a bias `(B, N, T, T)`."""

    @property
    def num_layers(self) -> int:
        return self.query.shape[-3] // self.num_heads

    def layer(self, index: int) -> Graphs:
        """The graphs of one layer, 0-based; negative counts from the last."""
        index %= self.num_layers
        part = slice(index * self.num_heads, (index + 1) * self.num_heads)
        bias = self.bias
        if isinstance(bias, Tensor) and bias.shape[-3] > 1:
            bias = bias[..., part, :, :]
        equal = None if self.equal is None else self.equal[:, part]
        return replace(self, query=self.query[..., part, :, :], key=self.key[..., part, :, :], bias=bias, equal=equal)

    def whole_bias(self, targets: Tensor | slice = slice(None)) -> Tensor | float:
        """`bias` and what `equal` adds to it, of all targets or of some. That is `(B, N, T, T)`: best of one layer."""
        bias = self.bias
        if isinstance(bias, Tensor) and bias.shape[-2] > 1:
            bias = bias[..., targets, :]
        if self.equal is None or self.units is None:
            return bias
        known = self.units.masked_fill(self.units <= 1, -1)  # unknown units need not be equal
        target, source = self.units[:, targets, None], known[:, None, :]
        same, follows = ((target == other)[:, None].to(self.equal.dtype) for other in (source, _before(source)))
        for_same, for_following = self.equal[:, :, None, None]
        # in place: to allocate and first touch these tensors costs more than the arithmetic
        return (same * for_same).addcmul_(follows, for_following).add_(bias)

    def to(self, dtype: torch.dtype) -> Graphs:
        """With queries and keys of `dtype` (scores are fp32 at least, whatever it is)."""
        bias = _narrowed(self.bias, dtype) if isinstance(self.bias, Tensor) else self.bias
        equal = None if self.equal is None else _narrowed(self.equal, dtype)
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype), bias=bias, equal=equal)

    def attend(self, value: Tensor) -> Tensor:
        """`A_n value_n` for each graph: `value (B, N, T, Ev) -> (B, N, T, Ev)`. With relu2 no
        T x T tensor is made, but for the bias that `equal` needs."""
        value = value.to(self.query.dtype)  # differs under autocast only
        if self.activation == "softmax":
            out = attention(self.query, self.key, value, self._softmax_mask(), scale=self.scale)
        else:
            out = relu2_attention(self.query, self.key, value, self.whole_bias(), self.attn_mask, **self._settings())
        return cast(Tensor, out)

    def mix(
        self, features: Tensor, weights: tuple[Tensor, ...], chain_weights: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """`sum_n w_n A_n F + sum_n c_n Lambda_n F` per weight tensor of the tuple, as in `glomo.relu2_graph_mix`."""
        if self.activation == "softmax":
            out = graph_mix(self.materialise(), features, weights, chain_weights, num_heads=self.num_heads)
        else:
            out = relu2_graph_mix(
                self.query,
                self.key,
                features,
                weights,
                chain_weights,
                self.whole_bias(),
                self.attn_mask,
                num_heads=self.num_heads,
                **self._settings(),
            )
        return cast(tuple[Tensor, ...], out)

    def materialise(self) -> Tensor:
        """All graphs as one tensor `(B, N, T, T)`, in the direction's own order."""
        if self.activation == "softmax":
            identity = torch.eye(self.key.shape[-2], dtype=self.key.dtype, device=self.key.device)
            return self.attend(identity.expand(*self.key.shape[:-1], -1))
        return relu2_affinity(self.query, self.key, self.whole_bias(), self.attn_mask, **self._settings())

    @torch.no_grad()
    def statistics(self, lengths: Tensor) -> GraphStatistics:
        """Zero weights and dead rows among what the true lengths allow; one layer is materialised at a time."""
        size = self.query.shape[-2]
        valid = torch.arange(size, device=self.query.device) < lengths.to(self.query.device)[:, None]
        allowed = (valid[:, :, None] & valid[:, None, :])[:, None]
        if self.is_causal:
            allowed = allowed & torch.ones(size, size, dtype=torch.bool, device=allowed.device).tril(-1)
        if self.attn_mask is not None:
            allowed = allowed & self.attn_mask
        count = self.query.shape[-3]
        pairs = int(allowed.sum()) * count
        rows = int(allowed.any(-1).sum()) * count
        used = live = 0
        for index in range(self.num_layers):
            positive = (self.layer(index).materialise() > 0) & allowed
            used += int(positive.sum())
            live += int(positive.any(-1).sum())
        return GraphStatistics(pairs, pairs - used, rows, rows - live)

    def _settings(self) -> dict:
        return {
            "is_causal": self.is_causal,
            "diagonal": -1 if self.is_causal else 0,
            "scale": self.scale,
            "eps": self.eps,
        }

    def _softmax_mask(self) -> Tensor:
        """One mask for everything `attention` must leave out: strict causality has no argument of its own there."""
        size = self.query.shape[-2]
        allowed = torch.ones(size, size, dtype=torch.bool, device=self.query.device)
        if self.is_causal:
            allowed = allowed.tril(-1)
        if self.attn_mask is not None:
            allowed = allowed & self.attn_mask
        bias = self.whole_bias()
        if not isinstance(bias, Tensor) or bias.shape[-1] == 1:
            return allowed  # softmax does not feel what is constant along a row
        return torch.where(allowed, bias, float("-inf")).to(self.query.dtype)


def dead_row_rescue(
    graphs: Graphs, lengths: Tensor, margin: float, num_targets: int, generator: torch.Generator | None = None
) -> Tensor:
    """`mean(relu(margin - max_j s[t, j])^2)` over graphs and targets: pulls up rows whose scores are all low.

    A row whose scores are all negative has no gradient of its own and would stay dead. Only targets with a source
    count (0 < t < length). At most `num_targets` targets, the same in the whole batch, are drawn per call (from
    `generator`), so that the scores alive are `(B, N, num_targets, T)`.
    """
    if graphs.query.shape[-2] < 2:
        return torch.zeros((), device=graphs.query.device)
    score, counted = _some_scores(graphs, lengths, num_targets, generator)
    best = score.amax(-1)
    best = torch.where(counted, best, margin)  # before the square: a row without sources is -inf, its gradient NaN
    return (margin - best).relu().square().sum() / counted.sum().clamp(min=1)


def graph_l1(graphs: Graphs, lengths: Tensor, num_targets: int, generator: torch.Generator | None = None) -> Tensor:
    """`mean_t sum_j r[t, j]`, r = relu(s), over graphs and targets: pulls weak links to zero.

    Of the weights before they are normalised, whose rows would all sum to one. Targets are drawn and counted as in
    `dead_row_rescue`.
    """
    if graphs.query.shape[-2] < 2:
        return torch.zeros((), device=graphs.query.device)
    score, counted = _some_scores(graphs, lengths, num_targets, generator)
    return torch.where(counted, score.relu().sum(-1), 0.0).sum() / counted.sum().clamp(min=1)


def _some_scores(
    graphs: Graphs, lengths: Tensor, num_targets: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The scores `(B, N, n, T)` of n targets, -inf where nothing may be read, and which `(B, N, n)` of these targets
    are of the sequence and have a source."""
    size, device = graphs.query.shape[-2], graphs.query.device
    drawn = torch.randperm(size - 1, generator=generator)[:num_targets] + 1
    target = drawn.sort().values.to(device)
    allowed = torch.arange(size, device=device) < target[:, None]
    if graphs.attn_mask is not None:
        allowed = allowed & graphs.attn_mask
    score = graphs.scale * graphs.query[..., target, :] @ graphs.key.transpose(-1, -2) + graphs.whole_bias(target)
    score = wide(score).masked_fill(~allowed, float("-inf"))
    return score, ((target < lengths.to(device)[:, None])[:, None] & allowed.any(-1)).expand(score.shape[:-1])
