"""The model of a probe, and how it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from glomo.transfer.probing.splits import seeded
from glomo.transfer.scalar_mix import ScalarMix

Features = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe is trained; the defaults are those of Liu et al., NAACL 2019.

    Raises:
        ValueError: the kind is unknown; a number is not above 0.
    """

    kind: Literal["linear", "mlp"] = "linear"
    hidden: int = 1024
    """of "mlp": width of its one hidden layer, with ReLU"""
    lr: float = 1e-3
    """of Adam"""
    batch_size: int = 80
    epochs: int = 50
    """at most"""
    patience: int = 3
    """epochs without a better score on the held-out rows after which training ends"""
    seed: int = 0
    """of the weights, of the order of the rows and of the split"""

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "mlp"):
            raise ValueError(f"kind is {self.kind!r}; linear or mlp is needed")
        for name in ("hidden", "lr", "batch_size", "epochs", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a number above 0 is needed")


LINEAR = ProbeSettings()
MLP = ProbeSettings(kind="mlp")


class Probe(nn.Module):
    """A linear map of standardised features, or one with a hidden layer:

    .. code-block:: text

        z = (x - mean) / std,    y = W z + b    or    y = W_2 relu(W_1 z + b_1) + b_2

    where mean and std (buffers) are those of the training rows; of several layers z is their `ScalarMix`, each layer
    standardised by itself. What does not vary is not scaled.

    Args:
        dim: width of the features.
        outputs: how many numbers y has.
        layers: how many layers are mixed; 1: none are.
        settings: kind, hidden and seed; the weights begin as those of `nn.Linear` do, drawn from a generator of the
            probe's own.

    Source: Liu et al., NAACL 2019, section 3; the mixture: Peters et al., NAACL 2018, equation 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        dim: int,
        outputs: int,
        layers: int = 1,
        settings: ProbeSettings = LINEAR,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        generator = seeded(settings.seed, "weights")
        self.register_buffer("mean", torch.zeros(layers, dim, dtype=dtype))
        self.register_buffer("std", torch.ones(layers, dim, dtype=dtype))
        self.mix = ScalarMix(layers).to(dtype) if layers > 1 else None
        widths = [dim, outputs] if settings.kind == "linear" else [dim, settings.hidden, outputs]
        parts: list[nn.Module] = []
        for inputs, width in pairwise(widths):
            parts += [_linear(inputs, width, generator, dtype), nn.ReLU()]
        self.network = nn.Sequential(*parts[:-1])
        self.to(device)

    def standardise_by(self, layers: Features) -> None:
        """Take the statistics of these rows, (N, dim) of each layer."""
        for number, layer in enumerate(layers_of(layers)):
            x = layer.detach().double()
            std = x.std(0, correction=0).masked_fill(x.amax(0) == x.amin(0), 1)
            self.mean[number], self.std[number] = x.mean(0).to(self.mean), std.to(self.std)

    def forward(self, layers: Features) -> Tensor:
        """(N, dim), or as many of them as there are layers -> (N, outputs)."""
        standard = [
            (layer.to(self.mean) - mean) / std
            for layer, mean, std in zip(layers_of(layers), self.mean, self.std, strict=True)
        ]
        return self.network(standard[0] if self.mix is None else self.mix(standard))


def layers_of(features: Features) -> list[Tensor]:
    """One layer or several, as a list."""
    return [features] if isinstance(features, Tensor) else list(features)


def _linear(inputs: int, outputs: int, generator: torch.Generator, dtype: torch.dtype) -> nn.Linear:
    """As `nn.Linear` begins, but drawn from the generator."""
    layer, bound = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=dtype), inputs**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
