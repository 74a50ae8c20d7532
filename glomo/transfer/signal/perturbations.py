"""Perturbations of examples: units masked or dropped, noise on embeddings. Padding is never touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glomo.nn.embedded import PAD


def mask_units(
    units: Tensor, probability: float, replacement: int, generator: torch.Generator | None = None, padding: int = PAD
) -> Tensor:
    """Every unit is replaced by another (that of masked or of unknown units) with a probability, each for itself.

    Args:
        units: (..., T) integers.
        generator: of the choice; on any device.
        padding: the unit that is left as it is.

    Raises:
        ValueError: the probability is not from 0 to 1.

    Source: Clark et al., EMNLP 2018 (CVT), in spirit: a restricted view of the input.
    """
    chosen = _uniform(units, generator) < _probability(probability)
    return units.masked_fill(chosen & (units != padding), replacement)


def drop_units(
    units: Tensor, probability: float, generator: torch.Generator | None = None, padding: int = PAD
) -> tuple[Tensor, Tensor]:
    """Every unit is left out with a probability, each for itself; the others close up. At least one stays.

    Args:
        units: (B, T) integers, padded at the end.
        generator: of the choice; on any device.
        padding: the unit that fills up, and does not count.

    Returns:
        units (B, T), padded at the end, and lengths (B,) int64: 0 only where there was no unit.

    Raises:
        ValueError: the probability is not from 0 to 1, or units are not (B, T).
    """
    if units.dim() != 2:
        raise ValueError(f"units have the shape {tuple(units.shape)}; (batch, units) is needed")
    if not units.size(1):
        return units.clone(), units.new_zeros(len(units), dtype=torch.int64)
    draws = _uniform(units, generator).masked_fill(units == padding, -1.0)
    kept = draws >= _probability(probability)
    # the unit with the highest draw would be the last one to go
    kept |= draws == draws.amax(1, keepdim=True)
    kept &= units != padding
    lengths = kept.sum(1)
    closed = units.gather(1, (~kept).to(torch.uint8).argsort(dim=1, stable=True))
    return closed.masked_fill(torch.arange(units.size(1), device=units.device) >= lengths[:, None], padding), lengths


def add_noise(x: Tensor, std: float, generator: torch.Generator | None = None, mask: Tensor | None = None) -> Tensor:
    """x + std e, with e of the standard normal distribution.

    Args:
        x: (..., dim) floating point.
        generator: of the noise; on any device.
        mask: (...) bool, the vectors that get noise; None: all.

    Raises:
        ValueError: std is negative, or the mask does not fit.
    """
    if not 0 <= std < float("inf"):
        raise ValueError(f"std is {std}; a number from 0 on is needed")
    device = generator.device if generator is not None else x.device
    noise = std * torch.randn(x.shape, generator=generator, device=device).to(x.device, x.dtype)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
            raise ValueError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}; a boolean one of shape {tuple(x.shape[:-1])} is "
                "needed"
            )
        noise = noise.masked_fill(~mask[..., None], 0.0)
    return x + noise


@contextmanager
def embedding_noise(
    embedding: nn.Module, std: float, generator: torch.Generator | None = None, padding: int = PAD
) -> Iterator[None]:
    """Within it the outputs of an embedding have noise on them (`add_noise`), without a change of the model:

    .. code-block:: text

        with embedding_noise(model.embedding, 0.1, generator):
            perturbed = model(units)

    Args:
        embedding: a module of integers to vectors (no noise where they are `padding`), or of anything to vectors.

    Raises:
        ValueError: std is negative, at the module's first call.
        TypeError: the module does not give one tensor, likewise.
    """

    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(f"the module gives {type(output).__name__}; noise is added to one tensor of vectors")
        units = next(iter([*inputs, *named.values()]), None)
        mask = None
        if isinstance(units, Tensor) and not units.is_floating_point() and units.shape == output.shape[:-1]:
            mask = units != padding
        return add_noise(output, std, generator, mask)

    handle = embedding.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _probability(probability: float) -> float:
    if not 0 <= probability <= 1:
        raise ValueError(f"probability is {probability}; a number from 0 to 1 is needed")
    return probability


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else like.device
    return torch.rand(like.shape, generator=generator, device=device).to(like.device)
