"""How wide a module's input and output are, and in which dimension their features lie."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from glomo.nn.transformer_layers import Layer


class Features(NamedTuple):
    """Of a module's input and output."""

    inputs: int | None
    """None: it reads ids"""
    outputs: int
    dim: int
    """where the features lie, counted from the end"""


def features(module: nn.Module, name: str, width: int | None = None, dim: int = -1) -> Features:
    """The features of linear layers, convolutions (1d to 3d), embeddings, recurrent layers, one-dimensional LayerNorms,
    attentions, and the layers of `glomo.nn`'s Transformers; of other modules those that the caller gives.

    Args:
        name: of the module, for the sentence.
        width: of its input and output; None: inferred.
        dim: where the features lie if the width is given.

    Raises:
        ValueError: the width cannot be inferred.
    """
    if width is not None:
        return Features(width, width, dim)
    if isinstance(module, nn.Linear):
        return Features(module.in_features, module.out_features, -1)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Features(module.in_channels, module.out_channels, -1 - len(module.kernel_size))
    if isinstance(module, nn.Embedding):
        return Features(None, module.embedding_dim, -1)
    if isinstance(module, nn.RNNBase):
        one = module.proj_size or module.hidden_size
        return Features(module.input_size, one * (2 if module.bidirectional else 1), -1)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return Features(module.normalized_shape[0], module.normalized_shape[0], -1)
    if isinstance(module, nn.MultiheadAttention):
        return Features(module.embed_dim, module.embed_dim, -1)
    if isinstance(module, Layer):
        return Features(module.inner.in_features, module.outer.out_features, -1)
    raise ValueError(
        f"the width of {name!r}, a {type(module).__name__}, cannot be inferred; give width=, and dim= where its "
        "features are not in the last dimension"
    )


def both_features(module: nn.Module, name: str, width: int | None = None, dim: int = -1) -> tuple[int, int, int]:
    """`features` of a module that is to have something beside it.

    Raises:
        ValueError: as for `features`; the module reads ids.
    """
    inputs, outputs, where = features(module, name, width, dim)
    if inputs is None:
        raise ValueError(f"{name!r}, a {type(module).__name__}, reads ids; a parallel adapter needs features")
    return inputs, outputs, where


def at_least_one(**sizes: int) -> None:
    """Raises ValueError for a size below 1, by its name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; at least 1 is needed")
