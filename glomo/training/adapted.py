"""The [adapter] section of a recipe: small modules that learn in the place of the language model they are in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from glomo.errors import UserError
from glomo.nn.awd_lstm import LSTMLanguageModel
from glomo.training.config import check_range
from glomo.training.document_classifier import DocumentClassifier
from glomo.transfer.structure import (
    add,
    bottleneck,
    lora,
    parallel_bottleneck,
    parallel_residual,
    projected_attention,
)
from glomo.transfer.structure.insertion import Make

PLACES = {
    "lstm": r"encoder\.layers\.\d+",
    "transformer": r"decoder\.layers\.\d+\.(?:attention\.out|outer)",
    "transformer, lora": r"decoder\.layers\.\d+\.attention\.(?:packed|out)",
    "transformer, residual": r"decoder\.layers\.\d+",
    "transformer, projected-attention": r"decoder\.layers\.\d+",
}
"""Modules of a language model that have an adapter, where the recipe does not say which: all LSTM layers; the ends of
attention and of feed-forward (Houlsby et al. 2019); attention's projections (Hu et al. 2022); whole layers (Stickland &
Murray 2019). Residual adapters were published beside each convolution (Rebuffi et al. 2018), of whose weights they have
a ninth; beside each layer they have an eighth or a twelfth."""


@dataclass(frozen=True)
class Adapters:
    """The [adapter] section. Raises UserError for values out of range."""

    kind: Literal["none", "bottleneck", "parallel", "lora", "residual", "projected-attention"] = "none"
    """with any but none the language model's own weights stay as they are; residual: a linear map beside each layer;
    projected-attention: a narrow attention beside each layer of a Transformer"""
    where: str = ""
    """a regular expression for the modules of the language model that have one; empty: all LSTM layers, or the usual
    places in a Transformer"""
    size: int = 0
    """width of bottleneck, parallel and projected-attention; 0: as published, which is 64, 64 and 204"""
    r: int = 8
    """rank of lora"""
    alpha: float = 8.0
    """of lora: alpha / r times what it adds"""
    heads: int = 12
    """of projected-attention; its width is a multiple of them"""
    norms: bool = True
    """LayerNorms of a Transformer learn too, except with lora"""

    def __post_init__(self) -> None:
        for name in ("r", "heads"):
            check_range(f"adapter.{name}", getattr(self, name), 1)
        for name in ("size", "alpha"):
            check_range(f"adapter.{name}", getattr(self, name), 0)

    def __bool__(self) -> bool:
        return self.kind != "none"


def insert_adapters(settings: Adapters, classifier: DocumentClassifier) -> None:
    """Put adapters into a classifier's language model, and freeze what was there.

    Raises UserError where ``adapter.where`` names nothing that can have one, and for a projected attention in an LSTM.
    """
    if not settings:
        return
    model = classifier.language_model
    architecture = "lstm" if isinstance(model, LSTMLanguageModel) else "transformer"
    default = PLACES.get(f"{architecture}, {settings.kind}", PLACES[architecture])
    if settings.kind == "projected-attention" and architecture == "lstm":
        raise UserError(
            "adapter.kind is 'projected-attention', which stands beside the layers of a Transformer, and the language "
            "model is an LSTM; choose bottleneck, parallel, lora or residual"
        )
    model.requires_grad_(False)
    try:
        add(model, settings.where or default, _make(settings))
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter.kind is {settings.kind!r}: {error}") from None
    if settings.norms and settings.kind != "lora":
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.requires_grad_(True)


def _make(settings: Adapters) -> Make:
    size: dict[str, Any] = {"size": settings.size} if settings.size else {}
    if settings.kind == "bottleneck":
        return bottleneck(**size)
    if settings.kind == "parallel":
        return parallel_bottleneck(**size)
    if settings.kind == "lora":
        return lora(settings.r, settings.alpha)
    if settings.kind == "residual":  # the serial kind's BatchNorm would mix units with padding and with those behind
        return parallel_residual()
    return projected_attention(**size, heads=settings.heads, into="outer")
