"""The [adapter] section of a recipe: small modules that learn in the place of the language model they are in, and the
file of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

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
    save_adapters,
)
from glomo.transfer.structure.insertion import Make, adapters

FILE = "adapters.safetensors"
"""In a run folder: all that a run with adapters has learned."""

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


def save_adapted(classifier: DocumentClassifier, path: Path, about: Mapping[str, Any]) -> None:
    """Write what has learned into one file for `load_adapted`: adapters, head, mixture, norms; and `about`, in its
    metadata. The classifier is without a classifier of domains."""
    model = classifier.language_model
    inside = tuple(f"{one.path}." for one in adapters(model))
    learned = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(inside)]
    head = ["head", *(["mix"] if classifier.mix is not None else [])]
    head += [re.escape(f"language_model.{name}") for name in learned]
    base = {"learned": learned, "base": base_fingerprint(model, learned)}
    save_adapters(classifier, path, head, {**about, **base})


def base_fingerprint(model: nn.Module, learned: Collection[str] = ()) -> str:
    """The sha256 (hex) of a model's weights but for adapters and what has learned with them."""
    inside = tuple(f"{one.path}." for one in adapters(model))
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name not in learned and not name.startswith(inside):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
