"""Settings of a Transformer: one frozen dataclass of plain values, and the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from glomo.errors import UserError

_PRESETS: dict[str, dict[str, Any]] = {
    "base": {},
    "big": {"dim": 1024, "heads": 16, "ff": 4096, "dropout": 0.3},
    "small": {"dim": 256, "heads": 4, "layers": 3, "ff": 1024},
    "tiny": {"dim": 64, "heads": 2, "layers": 2, "ff": 256},
}
_CHOICES = {"norm": ("post", "pre"), "positions": ("sinusoidal", "learned", "relative")}


@dataclass(frozen=True)
class TransformerConfig:
    """Every setting of `Transformer` and `LanguageModel`; the defaults are the published base model's.

    Raises `UserError` for a value outside its range or choices.
    """

    vocab_size: int = 37_000
    """Number of unit ids, padding (0) and unknown (1) included; the model adds one that starts and ends a sequence."""
    dim: int = 512
    heads: int = 8
    layers: int = 6
    """Of the encoder, and of the decoder."""
    ff: int = 2048
    """Width of the feed-forward layers."""
    dropout: float = 0.1
    norm: str = "post"
    """`post`: LayerNorm(x + sublayer(x)), as published; `pre`: x + sublayer(LayerNorm(x)), and one more at the end."""
    positions: str = "sinusoidal"
    """`sinusoidal` (published), `learned`, or `relative`: a learned number a head and distance, added to the scores."""
    max_length: int = 1024
    """The longest sequence, its end included."""
    max_distance: int = 128
    """Of `relative`: distances beyond this one share its number."""
    encoder_attention: tuple[str, ...] = ("softmax",)
    """Self-attention of the encoder, one for all layers or one a layer: `softmax`, `relu2`, or `graph`, the mixture of
    a GLoMo graph."""
    decoder_attention: tuple[str, ...] = ("softmax",)
    """Self-attention of the decoder: `softmax` or `relu2`."""
    smoothing: float = 0.1
    """Label smoothing: this much of the probability is shared by all units but padding."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        for name in ("vocab_size", "dim", "heads", "layers", "ff", "max_length", "max_distance"):
            if not getattr(self, name) >= 1:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be at least 1.")
        for name in ("dropout", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be from 0 to below 1.")
        if self.dim % self.heads:
            raise UserError(f"model.dim is {self.dim}; it must be a multiple of model.heads, which is {self.heads}.")
        if self.positions == "sinusoidal" and self.dim % 2:
            raise UserError(f"model.dim is {self.dim}; sinusoidal positions need an even one.")
        for name, kinds in (
            ("encoder_attention", ("softmax", "relu2", "graph")),
            ("decoder_attention", ("softmax", "relu2")),
        ):
            given = getattr(self, name)
            if len(given) not in (1, self.layers) or not set(given) <= set(kinds):
                raise UserError(
                    f"model.{name} is {', '.join(given) or 'empty'}; it must be one of {', '.join(kinds)}, or one for "
                    f"each of the {self.layers} layers."
                )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TransformerConfig:
        """`base` and `big` as published, `small` and `tiny` for a CPU, with single values replaced."""
        if name not in _PRESETS:
            raise UserError(f"there is no preset {name!r}; there are {', '.join(_PRESETS)}.")
        return cls(**{**_PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON and TOML."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """The inverse of `to_dict`."""
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**settings)

    def kinds(self, name: str) -> tuple[str, ...]:
        """One kind of self-attention for every layer."""
        given = getattr(self, name)
        return given * self.layers if len(given) == 1 else given
