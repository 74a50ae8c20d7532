"""What a layer's own attention may read, from the arguments that the layer was called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glomo.nn.transformer_layers import Context

_PADDING = ("key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask")
_PAIRS = ("attn_mask", "src_mask", "tgt_mask")


class Readable(NamedTuple):
    """For :func:`glomo.attention`."""

    mask: Tensor | None
    """broadcastable to (B, heads, T, S): bool with True for what may be read, or added to the scores"""
    causal: bool


def readable(given: Mapping[str, Any], units: int) -> Readable:
    """The masks of PyTorch's attentions and Transformer layers, of glomo's, and of Hugging Face's layers.

    Args:
        given: the layer's arguments, by name.
        units: how long the layer's input is.

    Raises:
        ValueError: the masks differ between heads; the layer goes on from a cache, or reads a memory alone.
    """
    cached = given.get("past_key_values")  # the layers below have put this input into it already
    if given.get("cache") is not None or (cached is not None and cached.get_seq_length() > units):
        raise ValueError("a projected attention reads a whole sequence; it cannot go on from a cache")
    contexts = [value for value in given.values() if isinstance(value, Context)]
    own = [context for context in contexts if context.memory is None]
    if contexts and not own:
        raise ValueError("a projected attention reads its own sequence; it cannot stand beside one over a memory")
    if own:
        return Readable(own[0].allowed, own[0].causal)
    masks = [_inverted(given[name])[..., None, None, :] for name in _PADDING if given.get(name) is not None]
    masks += [_of_pairs(name, given[name]) for name in _PAIRS if given.get(name) is not None]
    if given.get("attention_mask") is not None:
        masks.append(_hugging_face(given["attention_mask"]))
    return Readable(_joined(masks), False)


def _inverted(mask: Tensor) -> Tensor:
    """PyTorch's modules hide where a bool mask is True."""
    return ~mask if mask.dtype == torch.bool else mask


def _of_pairs(name: str, mask: Tensor) -> Tensor:
    if mask.dim() != 2:
        raise ValueError(
            f"{name} is {tuple(mask.shape)}, another mask for each head; a projected attention has heads of its own, "
            "and needs one (T, S)"
        )
    return _inverted(mask)


def _hugging_face(mask: Tensor) -> Tensor:
    if mask.dim() == 2:  # 1 for what may be read
        return mask[:, None, None, :].bool()
    if mask.dim() != 4 or mask.size(1) != 1 or mask.size(-2) not in (1, mask.size(-1)):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}; a projected attention needs (B, S), or (B, 1, 1 or S, S) of a "
            "whole sequence"
        )
    return mask


def _joined(masks: list[Tensor]) -> Tensor | None:
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        joined = masks[0]
        for mask in masks[1:]:
            joined = joined & mask
        return joined
    floating = next(mask.dtype for mask in masks if mask.dtype != torch.bool)
    added = [
        torch.zeros_like(mask, dtype=floating).masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return sum(added[1:], added[0])
