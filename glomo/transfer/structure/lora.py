"""LoRA: a low-rank matrix beside a frozen weight, for linear layers, convolutions and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn.precision import at_least_fp32
from glomo.transfer.structure.adapter import Adapter
from glomo.transfer.structure.widths import at_least_one

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoRA(Adapter):
    """A low-rank summand of each of some weights:

    .. code-block:: text

        W + (alpha / r) B A,   A (r, columns) ~ U(-1/sqrt(columns), 1/sqrt(columns)),  B (rows, r) = 0

    where a weight of more than two dimensions is the matrix of its first one by all others. At the start nothing
    changes. In training W needs no gradient: freeze it.

    :func:`lora` makes one for a module; the subclasses say how it is computed.

    Args:
        shapes: {name of a weight in the module: its shape}.
        r: the rank.
        alpha: scales with r: another r needs no other rate.
        dropout: of the input that A reads, in training.
        generator: of A; it is on the CPU.

    Raises:
        ValueError: r is below 1, dropout no probability below 1.

    Source: Hu et al., ICLR 2022, section 4.1.
    """

    mergeable = True
    drops = True
    """whether there is an input to drop, which A alone reads"""

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        r: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        shapes = {name: list(shape) for name, shape in shapes.items()}
        super().__init__(shapes=shapes, r=r, alpha=alpha, dropout=dropout)
        at_least_one(r=r)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; a probability from 0 to below 1 is needed")
        if dropout and not self.drops:
            raise ValueError(
                f"dropout is {dropout}, but for {', '.join(shapes)} the sum of the weights is formed, and there is no "
                "input to drop; 0 is needed"
            )
        self.names, self.scale, self.dropout = tuple(shapes), alpha / r, dropout
        for name, (rows, *others) in shapes.items():
            a = torch.empty(r, torch.Size(others).numel())
            nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
            a_name, b_name = self._matrices(name)
            self.register_parameter(a_name, nn.Parameter(a))
            self.register_parameter(b_name, nn.Parameter(torch.zeros(rows, r)))

    def merged_weights(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: self._sum(name, module.get_parameter(name)) for name in self.names}

    def _sum(self, name: str, weight: Tensor) -> Tensor:
        """W + (alpha / r) B A, in fp32 at least."""
        a, b = (getattr(self, matrix) for matrix in self._matrices(name))
        dtype = torch.promote_types(weight.dtype, at_least_fp32(a.dtype))
        return weight.to(dtype) + ((self.scale * b.to(dtype)) @ a.to(dtype)).view_as(weight)

    @staticmethod
    def _matrices(name: str) -> tuple[str, str]:
        plain = name.replace(".", "_")
        return f"{plain}_a", f"{plain}_b"

    def _read(self, given: Mapping[str, Any], a: Tensor) -> Tensor:
        """What A reads: the input after dropout, in A's dtype."""
        x = self._input(given)
        if x.dtype != a.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.dtype)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class LinearLoRA(LoRA):
    """:class:`LoRA` of `nn.Linear`, beside it: W x + b + (alpha / r) B (A x). B A is never formed."""

    weight_a: Tensor
    weight_b: Tensor

    def change(self, module: nn.Module, given: Mapping[str, Any], output: Tensor) -> Tensor:
        low = F.linear(self._read(given, self.weight_a), self.weight_a)
        # scaled while it is narrow
        return (output + F.linear(self.scale * low, self.weight_b)).to(output.dtype)


class ConvLoRA(LoRA):
    """:class:`LoRA` of a convolution, beside it: a convolution to r channels (in each group, the same A) and a 1x1
    convolution from them."""

    weight_a: Tensor
    weight_b: Tensor

    def change(self, module: nn.Module, given: Mapping[str, Any], output: Tensor) -> Tensor:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        space = len(module.kernel_size)
        a = self.weight_a.view(-1, *module.weight.shape[1:]).repeat(module.groups, 1, *[1] * space)
        low = module._conv_forward(self._read(given, a), a, None)  # with the padding's mode
        b = self.weight_b.view(*self.weight_b.shape, *[1] * space)
        return (output + _CONVOLVE[space](self.scale * low, b, groups=module.groups)).to(output.dtype)


class EmbeddingLoRA(LoRA):
    """:class:`LoRA` of `nn.Embedding`, beside it: W_u + (alpha / r) B_u A for the unit u; padding stays as it is."""

    weight_a: Tensor
    weight_b: Tensor

    def change(self, module: nn.Module, given: Mapping[str, Any], output: Tensor) -> Tensor:
        assert isinstance(module, nn.Embedding)
        ids = self._input(given)
        how = module.padding_idx, None, 2.0, module.scale_grad_by_freq, module.sparse
        low = F.embedding(ids, self.weight_b, *how)
        return (output + (self.scale * low) @ self.weight_a).to(output.dtype)
