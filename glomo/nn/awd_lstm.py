"""The LSTM language model of Merity, Keskar and Socher (ICLR 2018): dropout on everything but the recurrence's states.
Its encoder is what ULMFiT transfers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.errors import UserError
from glomo.nn.embedded import PAD
from glomo.nn.losses import smoothed_cross_entropy
from glomo.nn.precision import at_least_fp32
from glomo.nn.recurrent_dropout import WeightDropLSTM, variational_dropout

State = list[tuple[Tensor, Tensor]]
"""(h, c) of every layer, each (1, B, width)."""

_DROPOUTS = ("dropout_input", "dropout_hidden", "dropout_output", "dropout_embedding", "weight_drop")
_PRESETS: dict[str, dict[str, Any]] = {
    "ulmfit": {},
    "classifier": dict(zip(_DROPOUTS, (0.4, 0.3, 0.0, 0.05, 0.5), strict=True)),
    "merity": dict(zip(_DROPOUTS, (0.65, 0.3, 0.4, 0.1, 0.5), strict=True)),
    "small": {"dim": 200, "hidden": 500, "layers": 2, **dict(zip(_DROPOUTS, (0.1, 0.1, 0.1, 0.02, 0.1), strict=True))},
    "tiny": {"dim": 32, "hidden": 48, "layers": 2, **dict(zip(_DROPOUTS, (0.05, 0.05, 0.05, 0.0, 0.05), strict=True))},
}


@dataclass(frozen=True)
class AWDLSTMConfig:
    """Every setting of `AWDLSTM` and `LSTMLanguageModel`; the defaults are ULMFiT's for fine-tuning a language model.

    Raises `UserError` for a value outside its range.
    """

    vocab_size: int = 60_000
    """Number of unit ids, padding (0) and unknown (1) included; the model adds one that starts and ends a text."""
    dim: int = 400
    """Width of the embeddings, and of the last layer, whose output meets them again in the logits."""
    hidden: int = 1150
    """Width of the layers below the last."""
    layers: int = 3
    dropout_input: float = 0.25
    """Of the embeddings."""
    dropout_hidden: float = 0.15
    """Between layers."""
    dropout_output: float = 0.1
    """Of the last layer's output."""
    dropout_embedding: float = 0.02
    """Of whole units, everywhere in the batch."""
    weight_drop: float = 0.2
    """Of the weights from state to state."""
    activation_reg: float = 2.0
    """alpha: the weight of the last layer's mean square, in training."""
    temporal_reg: float = 1.0
    """beta: the weight of the mean square of its change from unit to unit, in training."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "hidden", "layers"):
            if not getattr(self, name) >= 1:
                raise UserError(f"lstm.{name} is {getattr(self, name)!r}; it must be at least 1.")
        for name in _DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"lstm.{name} is {getattr(self, name)!r}; it must be from 0 to below 1.")
        for name in ("activation_reg", "temporal_reg"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"lstm.{name} is {getattr(self, name)!r}; it must be at least 0 and finite.")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> AWDLSTMConfig:
        """`ulmfit`; `classifier`, the same with ULMFiT's dropouts for classification; `merity`, as published for
        WikiText-2; `small` and `tiny` for a CPU; each with single values replaced."""
        if name not in _PRESETS:
            raise UserError(f"there is no preset {name!r}; there are {', '.join(_PRESETS)}.")
        return cls(**{**_PRESETS[name], **overrides})

    def scaled(self, mult: float) -> AWDLSTMConfig:
        """The same with all five dropouts times ``mult``, at most 0.99 each: one number for how much to regularise."""
        if not 0 <= mult < float("inf"):
            raise UserError(f"the dropouts cannot be multiplied by {mult!r}; a finite number of at least 0 is needed.")
        return dataclasses.replace(self, **{name: min(mult * getattr(self, name), 0.99) for name in _DROPOUTS})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON and TOML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AWDLSTMConfig:
        """The inverse of `to_dict`."""
        return cls(**values)


class Encoded(NamedTuple):
    """What `AWDLSTM` makes of units (B, T)."""

    raw: Tensor
    """(B, T, dim), the last layer's output."""
    dropped: Tensor
    """(B, T, dim), the same after dropout."""
    state: State
    """After the last step, to go on from; no gradient goes back through it."""
    layers: tuple[Tensor, ...]
    """The embeddings and every layer's output, none of them dropped out."""


class AWDLSTM(nn.Module):
    """Embeddings and layers of `WeightDropLSTM`, of the widths dim -> hidden -> ... -> hidden -> dim. The unit `end`
    (the last id) is the model's own: it starts and ends texts. Padding (0) stands behind sequences."""

    def __init__(self, config: AWDLSTMConfig) -> None:
        super().__init__()
        self.config, self.end = config, config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size + 1, config.dim, padding_idx=PAD)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.embedding.weight[PAD].data)
        widths = [config.dim, *[config.hidden] * (config.layers - 1), config.dim]
        self.layers = nn.ModuleList(
            WeightDropLSTM(inputs, outputs, config.weight_drop) for inputs, outputs in pairwise(widths)
        )

    def forward(self, units: Tensor, state: State | None = None) -> Encoded:
        """Units (B, T), read on from `state` (none: zeros).

        Raises:
            ValueError: the state is of another number of layers or sequences.
        """
        if state is not None and (len(state), state[0][0].size(1)) != (len(self.layers), len(units)):
            raise ValueError(
                f"the state is of {len(state)} layers and {state[0][0].size(1)} sequences; {len(self.layers)} layers "
                f"and {len(units)} sequences are needed"
            )
        config, after = self.config, State()
        raw = self._embedded(units)
        # dropout belongs to what it is applied to: a frozen layer in evaluation mode gives fixed features
        x, outputs = variational_dropout(raw, config.dropout_input, self.embedding.training), [raw]
        for number, layer in enumerate(self.layers):
            raw, (h, c) = layer(x, None if state is None else state[number])
            after.append((h.detach(), c.detach()))
            outputs.append(raw)
            p = config.dropout_output if number + 1 == len(self.layers) else config.dropout_hidden
            x = variational_dropout(raw, p, layer.training)
        return Encoded(raw, x, after, tuple(outputs))

    def _embedded(self, units: Tensor) -> Tensor:
        embedded, p = self.embedding(units), self.config.dropout_embedding
        if not (self.embedding.training and p):
            return embedded
        # the same as rows of the matrix dropped out, without a copy of the matrix
        return embedded * F.dropout(embedded.new_ones(self.embedding.num_embeddings), p)[units][..., None]


class LSTMLanguageModel(nn.Module):
    """Predicts every unit from those before it: `encoder`, and its embeddings as the logits' matrix with a bias of
    their own (`decoder`)."""

    def __init__(self, config: AWDLSTMConfig) -> None:
        super().__init__()
        self.config, self.end = config, config.vocab_size
        self.encoder = AWDLSTM(config)
        self.decoder = Bias(config.vocab_size + 1)

    def forward(self, inputs: Tensor, outputs: Tensor, state: State | None = None) -> tuple[Tensor, Tensor, State]:
        """(loss, nats, state) of what follows each of the inputs, both (B, T); where outputs are padding (0) nothing is
        asked, and nothing regularised. nats is the mean cross-entropy of a unit; in training

        .. code-block:: text

            loss = nats + alpha mean(d_t^2) + beta mean((h_t - h_{t-1})^2)

        with h the last layer's output and d the same after dropout; else loss is nats.
        """
        encoded = self.encoder(inputs, state)
        return (*self.loss(encoded, outputs), encoded.state)

    def loss(self, encoded: Encoded, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, nats) of `forward`, of inputs that are encoded."""
        real, weight, bias = outputs != PAD, self.encoder.embedding.weight, self.decoder.bias
        nats = smoothed_cross_entropy(encoded.dropped, weight, outputs, 0.0, PAD, bias) / real.sum().clamp(min=1)
        return (nats + activation_penalty(encoded, real, self.config) if self.training else nats), nats

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V), -inf for padding."""
        logits = F.linear(hidden, self.encoder.embedding.weight, self.decoder.bias)
        return logits.masked_fill(torch.arange(logits.size(-1), device=logits.device) == PAD, float("-inf"))

    def start(self) -> LSTMDecoding:
        """For `glomo.nn.decoding`."""
        return LSTMDecoding(self)


class Bias(nn.Module):
    """A number for each unit."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(units))


def activation_penalty(encoded: Encoded, real: Tensor, config: AWDLSTMConfig) -> Tensor:
    """alpha mean(d_t^2) + beta mean((h_t - h_{t-1})^2) over the `real` (B, T) places, and pairs of neighbours that are.

    Source: Merity, McCann and Socher, arXiv 1708.01009.
    """
    size, places, change, pairs = (x.sum() for x in activation_sums(encoded, real))
    return config.activation_reg * size / places.clamp(min=1) + config.temporal_reg * change / pairs.clamp(min=1)


def activation_sums(encoded: Encoded, real: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum of d_t^2, its places, sum of (h_t - h_{t-1})^2, its pairs) of each row, squares averaged over the width."""
    pairs, dtype = real[:, 1:] & real[:, :-1], at_least_fp32(encoded.raw.dtype)
    size = encoded.dropped.square().mean(-1, dtype=dtype) * real
    change = encoded.raw.diff(dim=1).square().mean(-1, dtype=dtype) * pairs
    return size.sum(1), real.sum(1), change.sum(1), pairs.sum(1)


class LSTMDecoding:
    """A batch being decoded unit by unit."""

    def __init__(self, model: LSTMLanguageModel) -> None:
        self.model = model
        self.state: State | None = None

    def step(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (B, V) of what follows, once tokens (B,) have been read."""
        encoded = self.model.encoder(tokens[:, None], self.state)
        self.state = encoded.state
        logits = self.model.logits(encoded.dropped[:, 0])
        return logits.log_softmax(-1, dtype=at_least_fp32(logits.dtype))

    def select(self, rows: Tensor) -> None:
        """Rows of the batch, in a new order."""
        if self.state is not None:
            self.state = [(h[:, rows], c[:, rows]) for h, c in self.state]
