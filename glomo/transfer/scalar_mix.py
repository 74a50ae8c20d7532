"""Scalar mix: one feature of several layers'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScalarMix(nn.Module):
    """A learned convex sum of layers:

    .. code-block:: text

        gamma * sum_k softmax(w)_k h_k,     w = 0, gamma = 1 at the start

    With `layer_norm` every h_k is normalised first, position by position: what else is in the batch does not matter.

    Args:
        layers: how many.
        layer_norm: normalise each over its last dimension, without parameters.

    Source: Peters et al., NAACL 2018, equation 1.
    """

    def __init__(self, layers: int, layer_norm: bool = False) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers is {layers}; at least 1 is needed")
        self.weights = nn.Parameter(torch.zeros(layers))
        self.gamma = nn.Parameter(torch.ones(()))
        self.layer_norm = layer_norm

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """Tensors of one shape (..., dim). Raises ValueError where they are not as many, or not of one shape."""
        if len(layers) != len(self.weights) or len({layer.shape for layer in layers}) != 1:
            shapes = ", ".join(str(tuple(layer.shape)) for layer in layers)
            raise ValueError(f"{len(self.weights)} layers of one shape are needed; given are {shapes or 'none'}")
        if self.layer_norm:
            layers = [F.layer_norm(layer, layer.shape[-1:]) for layer in layers]
        mixed = sum((w * layer for w, layer in zip(self.weights.softmax(0), layers, strict=True)), torch.zeros(()))
        return self.gamma * mixed
