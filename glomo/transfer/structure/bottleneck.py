"""Bottleneck adapters: a narrow network behind a module's output, or beside the module."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.transfer.structure.adapter import ParallelAdapter, SerialAdapter
from glomo.transfer.structure.insertion import Make
from glomo.transfer.structure.widths import at_least_one, both_features, features

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class BottleneckAdapter(SerialAdapter):
    """A narrow network with a residual around it, near the identity at the start:

    .. code-block:: text

        a(h) = h + W_up act(W_down h + b) + b',   W ~ N(0, std^2) cut at 2 std,  b = b' = 0

    Args:
        width: of h.
        size: of the bottleneck.
        activation: "gelu", "relu", "silu" or "tanh".
        std: of the weights at the start.
        dim: where the features of h lie.
        generator: of the weights at the start; it is on the CPU.

    Raises:
        ValueError: a size below 1, an unknown activation; in a call, h is of another width.

    Source: Houlsby et al., ICML 2019, section 2.1; after the attention's projection and after the feed-forward layer of
    each Transformer layer, before the residual, with LayerNorms and the head trained as well. The defaults are those of
    the released code.
    """

    def __init__(
        self,
        width: int,
        size: int = 64,
        activation: str = "gelu",
        std: float = 1e-3,
        dim: int = -1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width=width, size=size, activation=activation, std=std, dim=dim)
        _check(activation, width=width, size=size)
        self.activation, self.dim = activation, dim
        self.down = unset_linear(width, size)
        self.up = unset_linear(size, width)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        """h and the result have the width in dimension `dim`."""
        return h + _through(self.down, ACTIVATIONS[self.activation], self.up, h, self.dim)


class ParallelBottleneck(ParallelAdapter):
    """A narrow network beside a module y(x), nothing at the start:

    .. code-block:: text

        y + s W_up act(W_down x),   W_down ~ U(-1/sqrt(width), 1/sqrt(width)),  W_up = 0

    Args:
        inputs: width of x.
        outputs: width of y.
        size: of the bottleneck.
        activation: "gelu", "relu", "silu" or "tanh".
        scale: s.
        dim: where the features of x and y lie.
        generator: of the weights at the start; it is on the CPU.

    Raises:
        ValueError: a size below 1, an unknown activation; in a call, x is of another width.

    Source: He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR 2022, section 3.3.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 64,
        activation: str = "relu",
        scale: float = 4.0,
        dim: int = -1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(inputs=inputs, outputs=outputs, size=size, activation=activation, scale=scale, dim=dim)
        _check(activation, inputs=inputs, outputs=outputs, size=size)
        self.activation, self.scale, self.dim = activation, scale, dim
        self.down = unset_linear(inputs, size, bias=False)
        self.up = unset_linear(size, outputs, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to y."""
        return self.scale * _through(self.down, ACTIVATIONS[self.activation], self.up, x, self.dim)


def bottleneck(
    size: int = 64,
    activation: str = "gelu",
    std: float = 1e-3,
    width: int | None = None,
    dim: int = -1,
    generator: torch.Generator | None = None,
) -> Make:
    """For :func:`add`: a :class:`BottleneckAdapter` on the module's output. `width` and `dim` are needed where the
    module's features cannot be inferred."""

    def make(module: nn.Module, name: str) -> BottleneckAdapter:
        _, outputs, where = features(module, name, width, dim)
        return BottleneckAdapter(outputs, size, activation, std, where, generator)

    return make


def parallel_bottleneck(
    size: int = 64,
    activation: str = "relu",
    scale: float = 4.0,
    width: int | None = None,
    dim: int = -1,
    generator: torch.Generator | None = None,
) -> Make:
    """For :func:`add`: a :class:`ParallelBottleneck` beside the module. `width` (of input and output) and `dim` are
    needed where the module's features cannot be inferred."""

    def make(module: nn.Module, name: str) -> ParallelBottleneck:
        inputs, outputs, where = both_features(module, name, width, dim)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise ValueError(
                f"{name!r} is a {type(module).__name__}, whose output has other places than its input; "
                "parallel_residual() goes beside a convolution"
            )
        return ParallelBottleneck(inputs, outputs, size, activation, scale, where, generator)

    return make


def unset_linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer whose weights hold anything: no random number is drawn for them."""
    return torch.nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)


def _through(down: nn.Linear, activation: Callable[[Tensor], Tensor], up: nn.Linear, x: Tensor, dim: int) -> Tensor:
    if x.dim() < abs(dim) or x.size(dim) != down.in_features:
        raise ValueError(
            f"an adapter of width {down.in_features} in dimension {dim} was given {tuple(x.shape)}; give the module's "
            "width= and dim="
        )
    return up(activation(down(x.movedim(dim, -1)))).movedim(-1, dim)


def _check(activation: str, **sizes: int) -> None:
    at_least_one(**sizes)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
