"""Residual adapters: 1x1 convolutions behind or beside a network's own, and the same beside layers of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn.precision import at_least_fp32
from glomo.transfer.structure.adapter import ParallelAdapter, SerialAdapter
from glomo.transfer.structure.insertion import Make
from glomo.transfer.structure.widths import at_least_one, both_features

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class SerialResidual(SerialAdapter):
    """A normalised 1x1 convolution with a residual around it, the identity at the start:

    .. code-block:: text

        y + A BatchNorm(y),   A = 0 at the start

    Whether the network's own BatchNorms learn with it, as in the paper, is a matter of the layer groups.

    Args:
        channels: of y (B, channels, ...).
        dims: of space, 1 to 3.

    Raises:
        ValueError: channels or dims out of their range.

    Source: Rebuffi, Bilen and Vedaldi, NIPS 2017, section 3; BatchNorm where the released code has it.
    """

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__(channels=channels, dims=dims)
        _check_dims(dims)
        at_least_one(channels=channels)
        self.norm = _NORMS[dims](channels)
        self.weight = nn.Parameter(torch.zeros(channels, channels, *[1] * dims))

    def forward(self, y: Tensor) -> Tensor:
        """(B, channels, ...) -> the same."""
        return y + _CONVOLVE[y.dim() - 2](self.norm(y), self.weight)


class ParallelResidual(ParallelAdapter):
    """A 1x1 convolution beside a convolution of any odd size, with its stride and its groups:

    .. code-block:: text

        conv(x; W) + A x = conv(x; W + A in the centre),   A = 0 at the start

    By the second form :func:`merge` makes it free, as it does beside a linear layer. Without dimensions of space it is
    a linear map of the last dimension, y + A x, beside a layer of any kind.

    Args:
        inputs, outputs: channels of x (B, inputs, ...) and of the result; without space (..., inputs).
        stride: the convolution's, one number for each dimension of space; (): there is none.
        groups: the convolution's; 1 without space.

    Raises:
        ValueError: a size below 1, or not as many strides as there can be dimensions; channels no multiple of groups.

    Source: Rebuffi, Bilen and Vedaldi, CVPR 2018, section 3, of convolutions.
    """

    mergeable = True

    def __init__(self, inputs: int, outputs: int, stride: Sequence[int] = (1, 1), groups: int = 1) -> None:
        super().__init__(inputs=inputs, outputs=outputs, stride=list(stride), groups=groups)
        if stride:
            _check_dims(len(stride))
        at_least_one(inputs=inputs, outputs=outputs, groups=groups, stride=min(stride, default=1))
        if groups > 1 and not stride:
            raise ValueError(f"groups is {groups}, and there are no dimensions of space; 1 is needed")
        if inputs % groups or outputs % groups:
            raise ValueError(f"inputs {inputs} and outputs {outputs} must be multiples of groups, which is {groups}")
        self.stride, self.groups = tuple(stride), groups
        self.weight = nn.Parameter(torch.zeros(outputs, inputs // groups, *[1] * len(stride)))

    def attach(self, module: nn.Module) -> None:
        self.mergeable = bool(self.stride) or isinstance(module, nn.Linear)
        super().attach(module)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, ...) -> (B, outputs, ...), every `stride`-th place; without space (..., inputs) -> (...,
        outputs)."""
        if not self.stride:
            return F.linear(x, self.weight)
        convolve = _CONVOLVE[len(self.stride)]
        result: Tensor = convolve(x, self.weight, stride=self.stride, groups=self.groups)
        return result

    def merged_weights(self, module: nn.Module) -> dict[str, Tensor]:
        weight = module.get_parameter("weight")
        merged = weight.to(at_least_fp32(weight.dtype), copy=True)
        centre = (slice(None), slice(None), *(slice(size // 2, size // 2 + 1) for size in weight.shape[2:]))
        merged[centre] += self.weight
        return {"weight": merged}


def serial_residual() -> Make:
    """For :func:`add`: a :class:`SerialResidual` on a convolution's output."""

    def make(module: nn.Module, name: str) -> SerialResidual:
        convolution = _convolution(module, name)
        return SerialResidual(convolution.out_channels, len(convolution.kernel_size))

    return make


def parallel_residual(width: int | None = None) -> Make:
    """For :func:`add`: a :class:`ParallelResidual` beside a convolution, or beside a layer of features: linear,
    recurrent, a Transformer's, or another one of this `width` (of input and output).

    Raises:
        ValueError: the convolution's centre does not lie on its input's places: it is of an even size, or its padding
            is not dilation (size - 1) / 2; the width cannot be inferred; the module reads ids.
    """

    def make(module: nn.Module, name: str) -> ParallelResidual:
        if isinstance(module, Convolution):
            _check_centred(module, name)
            return ParallelResidual(module.in_channels, module.out_channels, module.stride, module.groups)
        inputs, outputs, _ = both_features(module, name, width)
        return ParallelResidual(inputs, outputs, ())

    return make


def _convolution(module: nn.Module, name: str) -> Convolution:
    if not isinstance(module, Convolution):
        raise TypeError(f"{name!r} is a {type(module).__name__}; a residual adapter needs a Conv1d, Conv2d or Conv3d")
    return module


def _check_centred(convolution: Convolution, name: str) -> None:
    sizes, dilation, padding = convolution.kernel_size, convolution.dilation, convolution.padding
    needed = tuple(d * (size - 1) // 2 for d, size in zip(dilation, sizes, strict=True))
    if padding == "valid":
        padding = (0,) * len(sizes)
    if any(size % 2 == 0 for size in sizes) or (padding != "same" and tuple(padding) != needed):
        raise ValueError(
            f"{name!r} has kernel_size {tuple(sizes)} and padding {padding}; a parallel adapter needs odd sizes, and "
            f"padding {needed} for these"
        )


def _check_dims(dims: int) -> None:
    if dims not in _CONVOLVE:
        raise ValueError(f"there are {dims} dimensions of space; 1 to 3 are possible")
