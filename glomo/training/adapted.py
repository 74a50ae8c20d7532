"""The [adapter] section of a recipe: small modules that learn in the place of the language model they are in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glomo.errors import UserError
from glomo.nn.awd_lstm import LSTMLanguageModel
from glomo.training.config import check_range
from glomo.training.document_classifier import DocumentClassifier
from glomo.transfer.structure import add, bottleneck, lora, parallel_bottleneck

PLACES = {
    "lstm": r"encoder\.layers\.\d+",
    "transformer": r"decoder\.layers\.\d+\.(?:attention\.out|outer)",
    "transformer, lora": r"decoder\.layers\.\d+\.attention\.(?:packed|out)",
}
"""Modules of a language model that have an adapter, where the recipe does not say which: all LSTM layers; the ends of
attention and of feed-forward (Houlsby et al. 2019); attention's projections (Hu et al. 2022)."""


@dataclass(frozen=True)
class Adapters:
    """The [adapter] section. Raises UserError for values out of range."""

    kind: Literal["none", "bottleneck", "parallel", "lora"] = "none"
    """with any but none the language model's own weights stay as they are"""
    where: str = ""
    """a regular expression for the modules of the language model that have one; empty: all LSTM layers, or the usual
    places in a Transformer"""
    size: int = 64
    """width of bottleneck and parallel"""
    r: int = 8
    """rank of lora"""
    alpha: float = 8.0
    """of lora: alpha / r times what it adds"""
    norms: bool = True
    """LayerNorms of a Transformer learn too, except with lora"""

    def __post_init__(self) -> None:
        for name in ("size", "r"):
            check_range(f"adapter.{name}", getattr(self, name), 1)
        check_range("adapter.alpha", self.alpha, 0)

    def __bool__(self) -> bool:
        return self.kind != "none"


def insert_adapters(settings: Adapters, classifier: DocumentClassifier) -> None:
    """Put adapters into a classifier's language model, and freeze what was there.

    Raises UserError where ``adapter.where`` names nothing that can have one.
    """
    if not settings:
        return
    model = classifier.language_model
    architecture = "lstm" if isinstance(model, LSTMLanguageModel) else "transformer"
    default = PLACES.get(f"{architecture}, {settings.kind}", PLACES[architecture])
    made = {
        "bottleneck": lambda: bottleneck(settings.size),
        "parallel": lambda: parallel_bottleneck(settings.size),
        "lora": lambda: lora(settings.r, settings.alpha),
    }[settings.kind]()
    model.requires_grad_(False)
    try:
        add(model, settings.where or default, made)
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter.kind is {settings.kind!r}: {error}") from None
    if settings.norms and settings.kind != "lora":
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.requires_grad_(True)
