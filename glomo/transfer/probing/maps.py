"""Attention as pictures and as figures: what each head reads."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glomo.transfer.probing.evaluation import hooked, numbered, observing


def attention_maps(model: nn.Module, *inputs: Any, **named_inputs: Any) -> dict[str, Tensor]:
    """{name of an attention: weights (B, heads, T, S)} of one call of the model, in evaluation mode.

    Every `torch.nn.MultiheadAttention`, glomo's included, is asked for the weights of its heads, whatever its caller
    asks for; the caller gets what it has asked for. One that runs several times has a `name`, a `name (2)`, ... (Models
    of Hugging Face give theirs with `output_attentions=True`, as a list of the same shape.)

    Raises:
        ValueError: the model has no such attention, or none of them ran.
    """
    attentions = {name: m for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    found: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()
    wanted: defaultdict[str, list[tuple[bool, bool]]] = defaultdict(list)

    def before(name: str) -> Any:
        def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            wanted[name].append((bound.arguments["need_weights"], bound.arguments["average_attn_weights"]))
            bound.arguments.update(need_weights=True, average_attn_weights=False)
            return bound.args, bound.kwargs

        return ask

    def after(name: str) -> Any:
        def take(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> Any:
            out, weights = output
            calls[name] += 1
            found[numbered(name, calls[name])] = (weights if weights.dim() == 4 else weights[None]).detach()
            needed, mean = wanted[name].pop()
            return out, (weights.mean(-3) if mean else weights) if needed else None

        return take

    def asking(module: nn.Module, name: str) -> RemovableHandle:
        return module.register_forward_pre_hook(before(name), with_kwargs=True)

    def taking(module: nn.Module, name: str) -> RemovableHandle:
        return module.register_forward_hook(after(name))

    with observing(model), hooked(attentions, asking), hooked(attentions, taking):
        model(*inputs, **named_inputs)
    if not found:
        ran = "none of them ran" if attentions else "it has none"
        raise ValueError(f"the model's multi-head attentions are looked at, but {ran}")
    return found


class HeadStatistics(NamedTuple):
    """Figures of the heads of one layer, (heads,) each, means over the units that read something."""

    distance: Tensor
    """sum_j a_ij |i - j|, in units"""
    entropy: Tensor
    """-sum_j a_ij log a_ij, in nats: 0 where one unit is read, log T where all are alike"""
    diagonal: Tensor
    """a_ii, the share that a unit reads of itself"""
    previous: Tensor
    """a_i,i-1, over the units that have one before them"""
    first: Tensor
    """a_i0"""


def head_statistics(weights: Tensor, lengths: Tensor | None = None) -> HeadStatistics:
    """What the heads of a layer read.

    .. code-block:: text

        a_ij = weights_ij / sum_j weights_ij,    padding left out; units that read nothing do not count

    Args:
        weights: (B, heads, T, T), of self-attention or of a graph: target, source.
        lengths: (B,) units of each sequence; none: all.

    Returns:
        the figures, in fp64; nan for a head that reads nothing.

    Raises:
        ValueError: the weights are not square or negative, a length is not from 1 to T.

    Source: Clark et al., BlackboxNLP 2019, look at heads so.
    """
    if weights.dim() != 4 or weights.size(2) != weights.size(3) or bool((weights < 0).any()):
        raise ValueError(f"the weights are {tuple(weights.shape)}; (B, heads, T, T), none below 0, are needed")
    batch, _, size, _ = weights.shape
    lengths = torch.full((batch,), size) if lengths is None else torch.as_tensor(lengths)
    if lengths.shape != (batch,) or not batch or int(lengths.min()) < 1 or int(lengths.max()) > size:
        raise ValueError(f"the lengths are {lengths.tolist()}; {batch} numbers from 1 to {size} are needed")
    place = torch.arange(size, device=weights.device)
    real = place < lengths.to(weights.device)[:, None]
    a = weights.detach().double() * (real[:, None, :, None] & real[:, None, None, :])
    total = a.sum(-1, keepdim=True)
    reads = total[..., 0] > 0
    a = a / total.masked_fill(total == 0, 1)
    before = reads & (place > 0)

    def mean(of_units: Tensor, counted: Tensor) -> Tensor:
        return (of_units * counted).sum((0, 2)) / counted.sum((0, 2))

    return HeadStatistics(
        mean((a * (place[:, None] - place).abs()).sum(-1), reads),
        mean(-(a * a.clamp(min=1e-300).log()).sum(-1), reads),
        mean(a.diagonal(dim1=-2, dim2=-1), reads),
        mean(torch.nn.functional.pad(a.diagonal(-1, -2, -1), (1, 0)), before),
        mean(a[..., 0], reads),
    )


def draw_maps(
    weights: Sequence[Tensor] | Mapping[str, Tensor], words: Sequence[str], path: Path, example: int = 0
) -> None:
    """Heat maps (`glomo.plots.heat_maps`) of one sequence, one a layer and head, with the words along both sides.

    Args:
        weights: a layer each, (B, heads, T or more, T or more), of as many heads: of `attention_maps`, or Hugging
            Face's `attentions`.
        words: the T units of the sequence.
        path: where the PNG goes.
        example: which sequence of the batch.

    Raises:
        ValueError: the weights do not fit each other or the words.
    """
    from glomo.plots import heat_maps

    layers = list(weights.values()) if isinstance(weights, Mapping) else list(weights)
    size = len(words)
    shapes = {tuple(layer.shape) for layer in layers}
    if len(shapes) != 1 or any(len(shape) != 4 or min(shape[2:]) < size for shape in shapes) or not size:
        raise ValueError(
            f"the weights are {', '.join(map(str, sorted(shapes))) or 'none'}; (B, heads, T, T) of one shape, for at "
            f"least {size} units, are needed"
        )
    batch, heads = layers[0].shape[:2]
    if not 0 <= example < batch:
        raise ValueError(f"example is {example}; from 0 to {batch - 1} are there")
    chosen = torch.cat([layer[example, :, :size, :size] for layer in layers]).detach().float().cpu()
    heat_maps(chosen[None], heads, words, path)
