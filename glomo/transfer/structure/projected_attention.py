"""Projected attention layers (PALs): a narrow attention beside each layer, with projections that all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.kernels import attention
from glomo.transfer.structure.adapter import ParallelAdapter, on_first
from glomo.transfer.structure.bottleneck import unset_linear
from glomo.transfer.structure.insertion import Make
from glomo.transfer.structure.masks import readable
from glomo.transfer.structure.widths import at_least_one, features

STD = 0.02
"""Of the weights at the start, as BERT's."""


class BesideLayer(ParallelAdapter):
    """What stands beside a whole layer. Its result is added to the layer's output, or, with `into`, to that of a module
    in the layer: so it goes into the sum before the layer's last LayerNorm."""

    into = ""

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        self._summand: Tensor | None = None
        if self.into:
            self.detach()
            self._handles = [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.get_submodule(self.into).register_forward_hook(self._inside),
                module.register_forward_hook(self._after, always_call=True),
            ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._summand = self.beside(module, self._given(args, kwargs))

    def _inside(self, inner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        summand = self._summand
        return None if summand is None else on_first(output, lambda first: first + summand)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._summand = None  # and the graph that made it


class ProjectedAttention(BesideLayer):
    """A narrow attention beside a layer:

    .. code-block:: text

        h' = LayerNorm(h + SA(h) + TS(h)),   TS(h) = gelu(V_D MH(V_E h))

    MH is multi-head attention without an output projection. V_E and V_D are the same in all layers of a task, the
    attention is each layer's own. Weights are N(0, 0.02^2) at the start, biases 0.

    Args:
        width: of h.
        size: of V_E h.
        heads: of MH; `size` is a multiple of it. 12 as published; the released code has 6.
        dropout: of the attention's weights, in training.
        causal: no unit reads one behind it. Layers of `glomo.nn` say so themselves.
        batch_first: whether h is (B, T, width), or (T, B, width).
        into: dotted name of the module in the layer to whose output TS(h) is added; "": the layer itself.
        generator: of the weights at the start; it is on the CPU.

    Raises:
        ValueError: a size below 1, size no multiple of heads, dropout no probability below 1.

    Source: Stickland and Murray, ICML 2019, section 3; gelu where the released code has it.
    """

    def __init__(
        self,
        width: int,
        size: int = 204,
        heads: int = 12,
        dropout: float = 0.1,
        causal: bool = False,
        batch_first: bool = True,
        into: str = "",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            width=width, size=size, heads=heads, dropout=dropout, causal=causal, batch_first=batch_first, into=into
        )
        at_least_one(width=width, size=size, heads=heads)
        if size % heads:
            raise ValueError(f"size is {size}; it must be a multiple of heads, which is {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; a probability from 0 to below 1 is needed")
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.batch_first, self.into = batch_first, into
        self.encoder = _normal(width, size, generator)
        self.packed = _normal(size, 3 * size, generator)
        self.decoder = _normal(size, width, generator)

    def forward(self, h: Tensor, mask: Tensor | None = None, causal: bool | None = None) -> Tensor:
        """TS(h) of h (B, T, width), or (T, B, width) without batch_first.

        Args:
            mask: broadcastable to (B, heads, T, T): bool with True for what may be read, or added to the scores.
            causal: None: as the adapter is.
        """
        x = self.encoder(h if self.batch_first else h.transpose(0, 1))
        query, key, value = self.packed(x).unflatten(-1, (3, self.heads, -1)).movedim(-2, -4).unbind(-2)
        dropout_p = self.dropout if self.training else 0.0
        causal = self.causal if causal is None else causal
        read = cast(Tensor, attention(query, key, value, mask, dropout_p, causal))
        ts = F.gelu(self.decoder(read.transpose(-3, -2).flatten(-2)))
        return ts if self.batch_first else ts.transpose(0, 1)

    def beside(self, module: nn.Module, given: Mapping[str, Any]) -> Tensor:
        h = self._input(given)
        mask, causal = readable(given, h.size(-2 if self.batch_first else 0))
        return cast(Tensor, self(h, mask, self.causal or causal))


class LowRank(BesideLayer):
    """A narrow network beside a layer, the control of :class:`ProjectedAttention`; every layer has its own:

    .. code-block:: text

        h' = LayerNorm(h + SA(h) + TS(h)),   TS(h) = V_D gelu(V_E h)

    Args:
        width, size, into, generator: as in :class:`ProjectedAttention`.

    Source: Stickland and Murray, ICML 2019, section 3.
    """

    def __init__(self, width: int, size: int = 100, into: str = "", generator: torch.Generator | None = None) -> None:
        super().__init__(width=width, size=size, into=into)
        at_least_one(width=width, size=size)
        self.into = into
        self.encoder = _normal(width, size, generator)
        self.decoder = _normal(size, width, generator)

    def forward(self, h: Tensor) -> Tensor:
        """TS(h), of h (..., width)."""
        return cast(Tensor, self.decoder(F.gelu(self.encoder(h))))


def projected_attention(
    size: int = 204,
    heads: int = 12,
    dropout: float = 0.1,
    causal: bool = False,
    into: str = "",
    width: int | None = None,
    generator: torch.Generator | None = None,
) -> Make:
    """For :func:`add`: a :class:`ProjectedAttention` beside each layer. All that one call of this function makes are of
    one task: they share V_E and V_D.

    The padding and the pairs that an attention may not read are taken from the layer's arguments: PyTorch's masks,
    those of Hugging Face's layers, the `Context` of glomo's. Other layers: nothing is hidden, but by `causal`.

    Args:
        into: where in the layer TS(h) is added. PyTorch's layers with LayerNorm behind the sum: "dropout2"; BERT of
            Hugging Face: "output.dropout"; glomo's: "outer". "" is right where the layer's output is the sum.
        width: of h, where it cannot be inferred.

    Raises:
        ValueError: the layers are not of one width.
    """
    first: list[ProjectedAttention] = []

    def make(module: nn.Module, name: str) -> ProjectedAttention:
        wide = _width(module, name, into, width)
        adapter = ProjectedAttention(wide, size, heads, dropout, causal, _batch_first(module), into, generator)
        if first and first[0].settings["width"] != wide:
            raise ValueError(
                f"{name!r} is {wide} wide, and the first of the layers, whose V_E and V_D it shares, "
                f"{first[0].settings['width']}"
            )
        if first:
            adapter.encoder, adapter.decoder = first[0].encoder, first[0].decoder
        first.append(adapter)
        return adapter

    return make


def low_rank(
    size: int = 100, into: str = "", width: int | None = None, generator: torch.Generator | None = None
) -> Make:
    """For :func:`add`: a :class:`LowRank` beside each layer; arguments as in :func:`projected_attention`."""
    return lambda module, name: LowRank(_width(module, name, into, width), size, into, generator)


def _normal(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    linear = unset_linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=STD, generator=generator)
    nn.init.zeros_(linear.bias)
    return linear


def _width(module: nn.Module, name: str, into: str, width: int | None) -> int:
    """Of a layer: given, or of the module where the sum is made."""
    try:
        inner = module.get_submodule(into)
    except AttributeError:
        raise ValueError(
            f"into is {into!r}, and {name!r}, a {type(module).__name__}, has no module called so"
        ) from None
    return features(inner, f"{name}.{into}" if into else name, width).outputs


def _batch_first(module: nn.Module) -> bool:
    """PyTorch's attentions and the layers around them tell."""
    attending = getattr(module, "self_attn", module)
    return attending.batch_first if isinstance(attending, nn.MultiheadAttention) else True
