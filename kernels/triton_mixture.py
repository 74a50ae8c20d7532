"""A mixture of graphs on Triton, the host's side: operands, the two ways, gradients.

Every tensor is brought to one leading dimension, the batch: graphs (B, N, T, S), query and key (B, N, T|S, E), features
(B, S, F), weights (M, B, N, T); B, and in a bias, a mask and weights N and T, may be 1 where a tensor broadcasts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import triton_attention
from .arguments import broadcast
from .configurations import Configuration, block, configuration, precision, two_blocks, weight
from .launch import Launch, Lead, Operand, diagonal_within, is_wide, kind_of
from .triton_backward import score_gradients
from .triton_lists import mask_states, tile_lists, transposed

TOGETHER = 2
"""Mixtures of one launch: more would need more registers than there are ..."""
TOGETHER_UP_TO = 64
"""... and where sums of the features are held, these wider ones go one by one: smaller tiles would cost more."""
ALIGNMENT = 16
"""Columns of the features are filled up to a multiple of it, so that rows are copied in whole vectors."""


@dataclass
class Mix:
    """The inputs of a call in canonical shape."""

    graphs: Tensor | None  # or query and key
    query: Tensor | None
    key: Tensor | None
    features: Tensor
    weights: Tensor  # with those of the first layer's running products, which are its graphs
    chain_weights: Tensor | None  # of the running products of the other layers, or None where there are none
    bias: Tensor | None
    mask: Tensor | None
    num_heads: int
    diagonal: int | None
    scale: float
    eps: float
    lead: torch.Size
    width: int  # of the features as they were given

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, N, T, S."""
        rows = self.graphs if self.query is None else self.query
        assert rows is not None
        return self.lead.numel(), self.weights.size(-2), rows.size(-2), self.features.size(-2)

    @property
    def like(self) -> Tensor:
        """The query, or in its place nothing of the features' dtype and device."""
        return self.features[..., :0] if self.query is None else self.query

    @functools.cached_property
    def states(self) -> Operand | None:
        """Which blocks of pairs a mask allows, where it is the same for all graphs."""
        if self.mask is None or self.mask.size(1) != 1:
            return None
        b, _, t, s = self.sizes
        mask = self.mask[:, 0]
        return mask_states(Lead(torch.Size((b,)), [(mask, 2)]), mask, t, s, self.diagonal)

    @property
    def attention_numbers(self) -> triton_attention.Numbers:
        return 0.0, self.diagonal, self.scale, self.eps

    def groups(self, sums: bool) -> Iterator[slice]:
        """The mixtures of each launch, of a kernel that holds a sum for each of them or of another; fp32 has the
        registers for one."""
        alone = self.features.dtype == torch.float32 or (sums and self.features.size(-1) > TOGETHER_UP_TO)
        together = 1 if alone else TOGETHER
        for first in range(0, self.weights.size(0), together):
            yield slice(first, min(first + together, self.weights.size(0)))

    def row_numbers(self, *more: int) -> Tensor:
        """A number for every graph and target."""
        b, n, t, _ = self.sizes
        return torch.empty(*more, b, n, t, dtype=torch.float32, device=self.features.device)


def canonical(
    graphs: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    numbers: tuple[int, int | None, float, float],
) -> Mix:
    """From tensors with any leading dimensions; weights (M, ..., T or 1, N)."""
    lead = broadcast(*(t.shape[:-3] for t in (graphs, query, key) if t is not None), features.shape[:-2])

    def flat(t: Tensor, tail: int) -> Tensor:
        t = t[(None,) * max(tail - t.dim(), 0)]
        if t.shape[:-tail].numel() == 1:
            return t.reshape(1, *t.shape[t.dim() - tail :])
        return t.expand(*lead, *t.shape[t.dim() - tail :]).reshape(lead.numel(), *t.shape[t.dim() - tail :])

    def per_mixture(t: Tensor) -> Tensor:
        """Neighbouring targets are neighbours in memory: kernels load a graph's weights of a row of targets."""
        return torch.stack([flat(w.mT, 2) for w in t.unbind()])

    given = (graphs, query, key, bias, attn_mask)
    graphs, query, key, bias, mask = (None if t is None else flat(t, 3) for t in given)
    weights, width, features = per_mixture(weights), features.size(-1), padded(flat(features, 2))
    if chain_weights is not None:
        first, others = per_mixture(chain_weights).split((numbers[0], weights.size(-2) - numbers[0]), -2)
        weights = weights + torch.nn.functional.pad(first, (0, 0, 0, others.size(-2)))
        chain_weights = others if others.size(-2) else None
    return Mix(graphs, query, key, features, weights, chain_weights, bias, mask, *numbers, lead, width)


def padded(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (0, -t.size(-1) % ALIGNMENT)) if t.size(-1) % ALIGNMENT else t


def sums_first(num_graphs: int, num_mixtures: int, width: int, features: int) -> bool:
    """Whether the weighted tiles of the graphs are summed before one product with the features, or each graph is
    multiplied with the features.

    By the clocks of a multiprocessor of an H200 for 4096 pairs of a graph (bench/NOTES.md; predicted): the first takes
    a pass over the scores for 1 / (Z + eps), and another, in which each tile loads both queries and keys anew.
    """
    e, f = block(width), block(features)
    passes = num_mixtures if f > TOGETHER_UP_TO else -(-num_mixtures // TOGETHER)
    sums = num_graphs * (2 * e + 110 + passes * max(2 * e + 190, 7.5 * e)) + num_mixtures * 2 * f
    return sums < num_graphs * passes * (2 * (e + f) + 206)


def forward(mix: Mix, addend: Tensor | None, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out (M, B, T, F), 1 / (Z + eps) of every graph, empty for given graphs), without the running products, which
    come as the addend in fp32, and bring the second result with them."""
    b, n, t, _ = mix.sizes
    out = mix.features.new_empty(mix.weights.size(0), b, t, mix.features.size(-1))
    if mix.query is not None and inverse is None:
        inverse = mix.row_numbers()
        if not sums_first(n, mix.weights.size(0), mix.query.size(-1), mix.width):
            for part in mix.groups(sums=True):
                _multiply_each(mix, part, inverse, out)
            return out, inverse
        inputs = mix.query, mix.key, None, mix.bias, mix.mask
        # the same tiles: a row's squares and their sum then come from scores that are rounded alike
        part = next(mix.groups(sums=True))
        tile = _tile("mix", mix, part, (part.stop - part.start) * mix.features.size(-1))
        triton_attention.attend(torch.Size((b, n)), inputs, dict(inverse=inverse), mix.attention_numbers, tile=tile)
    weights = _normalised(mix, inverse)
    for part in mix.groups(sums=True):
        _sum_first(mix, part, weights, addend, out)
    return out, mix.features.new_empty(0) if inverse is None else inverse


def backward(
    mix: Mix, dout: Tensor, inverse: Tensor | None, needs: dict[str, bool], dgraphs: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients by the names of the inputs, in canonical shape, of weights (M, B, N, T); dgraphs (B, N, T, S) is added
    to."""
    b, _, _, s = mix.sizes
    gradients: dict[str, Tensor] = {}
    scores = needs["query"] or needs["key"] or needs["bias"]
    moments = mix.row_numbers(mix.weights.size(0)).zero_() if needs["weights"] or scores else None
    if moments is not None or dgraphs is not None:
        for part in mix.groups(sums=False):
            _moments(mix, part, dout, moments, dgraphs)
        if moments is not None and inverse is not None:
            moments *= inverse
    if needs["weights"] and moments is not None:
        gradients["weights"] = moments
    if needs["features"]:
        weights, shape = _normalised(mix, inverse), (b, s, mix.features.size(-1))
        parts = [torch.empty(shape, dtype=torch.float32, device=dout.device) for _ in mix.groups(sums=False)]
        for part, dfeatures in zip(mix.groups(sums=False), parts, strict=True):
            _features_gradient(mix, part, weights, dout, dfeatures)
        gradients["features"] = sum(parts[1:], parts[0]).sum_to_size(mix.features.shape)
    if scores and moments is not None:
        # mixture by mixture: a sum of dout would be rounded
        for weight_rows, cotangent, moment_rows in zip(mix.weights, dout, moments, strict=True):
            for name, gradient in _score_gradients(mix, weight_rows, cotangent, moment_rows, inverse, needs).items():
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return gradients


def _score_gradients(
    mix: Mix, weights: Tensor, dout: Tensor, moments: Tensor, inverse: Tensor | None, needs: dict[str, bool]
) -> dict[str, Tensor]:
    """Of query, key and bias, from one mixture: those of relu2_attention with the weight as a factor of dout."""
    assert mix.query is not None and mix.key is not None and inverse is not None
    rows = dict(inverse=inverse, delta=moments * weights, factors=weights)
    dquery, dkey, _, dbias = score_gradients(
        dout[:, None], None, rows, mix.query, mix.key, mix.features[:, None], mix.bias, mix.mask, None,
        mix.attention_numbers, [needs["query"], needs["key"], False, needs["bias"]],
    )  # fmt: skip
    return {name: x for name, x in dict(query=dquery, key=dkey, bias=dbias).items() if needs[name]}


def _normalised(mix: Mix, inverse: Tensor | None) -> Tensor:
    """weights / (Z + eps) (M, B, N, T), or the weights of given graphs: finite where the weight is, also where Z is
    almost 0."""
    if inverse is None:
        return mix.weights
    found = inverse * mix.weights
    return torch.where(found.isinf(), mix.weights.clamp(-1, 1) * torch.finfo(torch.float32).max, found)


def operand(t: Tensor | None, tail: int = 2) -> Operand | None:
    """Of a tensor (B, N, rows, columns), or (B, N, rows) with tail 1."""
    if t is None:
        return None
    d0, d2, *rest = (0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return Operand(t, d0, 0, d2, *rest[:tail])


def first_of(t: Tensor | None, part: slice, tail: int = 2) -> tuple[Operand | None, int]:
    """The operand of the first of a launch's mixtures, and how far it is to the next. t (M, B, rows, columns), or with
    tail 1 (M, B, N, rows)."""
    if t is None:
        return None, 0
    return operand(t[part.start] if tail == 1 else t[part.start][:, None], tail), t.stride(0)


def _tile(kernel: str, mix: Mix, part: slice, columns: int) -> Configuration:
    """The tile shape for some of the mixtures and so many columns in registers."""
    masked_or_several = mix.mask is not None or part.stop - part.start > 1
    heavy = weight(mix.diagonal, False, kind_of(mix.bias, scalars=True), masked_or_several, False)
    return configuration(kernel, mix.like, columns, heavy)


class _Shared:
    """What the four kernels share: `arguments` and `constants` of a launch for some of the mixtures, and a tile for
    `columns` of features in registers."""

    def __init__(
        self, kernel: str, mix: Mix, part: slice, weights: Tensor, columns: int, over_sources: bool = False
    ) -> None:
        b, n, t, s = mix.sizes
        self.tile = tile = _tile(kernel, mix, part, columns)
        rows, across = (s, tile.N) if over_sources else (t, tile.M)
        self.programs = b * ((rows + across - 1) // across)
        given = dict(graphs=mix.graphs, query=mix.query, key=mix.key, bias=mix.bias, mask=mix.mask)
        views = {name: operand(x) for name, x in given.items()}
        first_weights, step = first_of(weights, part, 1)
        self.arguments: dict[str, Any] = views | dict(
            weights=first_weights,
            weights_step=step,
            lists=_lists(mix, tile, over_sources),
            num_graphs=n,
            T=t,
            S=s,
            tiles=(rows + across - 1) // across,
            diagonal=diagonal_within(mix.diagonal, t, s),
            scale=mix.scale,
        )
        self.constants: dict[str, Any] = dict(
            WIDTH=mix.like.size(-1),
            CHECK_T=t % tile.M != 0,
            FEATURES=mix.features.size(-1),
            MIXTURES=part.stop - part.start,
            M=tile.M,
            N=tile.N,
            E=block(mix.like.size(-1)),
            F=tile.features,
            BIAS=kind_of(mix.bias, scalars=True),
            MASK=kind_of(mix.mask, scalars=False),
            CAUSAL=mix.diagonal is not None,
            SCALE=mix.scale != 1.0,
            PRECISION=precision(mix.features.dtype),
        )

    def launch(self, kernel: Callable, own: dict[str, Any], constants: dict[str, Any]) -> None:
        """A program for each tile, and for each chunk of the features where it is told how many batches there are."""
        arguments = own | self.arguments
        c = self.constants | constants
        operands = [x for x in arguments.values() if isinstance(x, Operand)]
        across = c["F"] + c.get("G", 0)
        c["WIDE"] = is_wide(operands, max(c["M"], c["N"]), max(c["E"], across, c["N"]))
        chunks = max((c["FEATURES"] + across - 1) // across, 1) if "batches" in own else 1
        Launch(kernel, self.programs * chunks, arguments, c, self.tile).run()

    def columns(self, sums: int) -> int:
        """Columns of the features at a time, so many sums of which are in registers."""
        return max(ALIGNMENT, self.tile.features // sums)


def _sum_first(mix: Mix, part: slice, weights: Tensor, addend: Tensor | None, out: Tensor) -> None:
    from .device.mixes import mixed_kernel

    sums, width = part.stop - part.start, mix.features.size(-1)
    shared = _Shared("mix", mix, part, weights, sums * width)
    result, step = first_of(out, part)
    own = dict(features=operand(mix.features[:, None]), addend=first_of(addend, part)[0], out=result, out_step=step)
    widths = two_blocks(shared.columns(sums))
    scaled = mix.features.dtype == torch.float16
    shared.launch(mixed_kernel, own | dict(batches=out.size(1)), widths | dict(SCALED=scaled))


def _multiply_each(mix: Mix, part: slice, inverse: Tensor, out: Tensor) -> None:
    from .device.mixes import graph_by_graph_kernel

    sums = part.stop - part.start
    shared = _Shared("mix_each", mix, part, mix.weights, sums * block(mix.features.size(-1)))
    result, step = first_of(out, part)
    own = dict(features=operand(mix.features[:, None]), out=result, out_step=step, eps=mix.eps, batches=out.size(1))
    own |= dict(inverse=operand(inverse, 1))
    scaled = mix.features.dtype != torch.bfloat16
    del shared.arguments["graphs"]
    shared.launch(graph_by_graph_kernel, own, dict(F=shared.columns(sums), SCALED=scaled))


def _features_gradient(mix: Mix, part: slice, weights: Tensor, dout: Tensor, dfeatures: Tensor) -> None:
    from .device.mixes import features_kernel

    cotangent, step = first_of(dout, part)
    own = dict(dout=cotangent, dout_step=step, dfeatures=operand(dfeatures[:, None]), batches=dout.size(1))
    shared = _Shared("mix_features", mix, part, weights, mix.features.size(-1), over_sources=True)
    widths, scaled = two_blocks(shared.columns(1)), mix.features.dtype == torch.float16
    shared.launch(features_kernel, own, widths | dict(SCALED=scaled))


def _moments(mix: Mix, part: slice, dout: Tensor, moments: Tensor | None, dgraphs: Tensor | None) -> None:
    from .device.mixes import moments_kernel

    (cotangent, step), (sums, sums_step) = first_of(dout, part), first_of(moments, part, 1)
    own = dict(dout=cotangent, dout_step=step, features=operand(mix.features[:, None]), dgraphs=operand(dgraphs))
    shared = _Shared("mix_moments", mix, part, mix.weights, block(mix.features.size(-1)))
    shared.launch(moments_kernel, own | dict(moments=sums, moments_step=sums_step), {})


def _lists(mix: Mix, tile: Configuration, over_sources: bool) -> Operand | None:
    """Tiles to visit, where a mask is the same for all graphs."""
    if mix.states is None:
        return None
    _, _, t, s = mix.sizes
    over_targets = mix.states, t, s, tile.M, tile.N
    lists = tile_lists(*((transposed(mix.states), s, t, tile.N, tile.M) if over_sources else over_targets))
    return lists._replace(d0=lists.d2, d2=0)
