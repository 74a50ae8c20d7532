"""Recurrent encoder and decoder, with and without attention: what the Transformer is compared with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from glomo.errors import UserError
from glomo.nn.attention import attend
from glomo.nn.embedded import Embedded


@dataclass(frozen=True)
class RNNConfig:
    """Every setting of `RNNTranslator`. Raises `UserError` for a value outside its range."""

    vocab_size: int = 8000
    """Number of unit ids, padding (0) and unknown (1) included; the model adds one that starts and ends a sequence."""
    dim: int = 256
    """Width of embeddings and states."""
    layers: int = 1
    """Of the encoder, and of the decoder."""
    attention: bool = True
    """The decoder reads all states of the encoder at every step; false: only the last one, as its start."""
    dropout: float = 0.1
    smoothing: float = 0.1
    """Label smoothing in training."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers"):
            if not getattr(self, name) >= 1:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be at least 1.")
        for name in ("dropout", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be from 0 to below 1.")
        if self.dim % 2:
            raise UserError(f"model.dim is {self.dim}; it must be even, half for each direction of the encoder.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON and TOML."""
        return dataclasses.asdict(self)


class RNNTranslator(Embedded):
    """Sequence to sequence by GRUs: a bidirectional encoder whose last states start the decoder.

    With attention the decoder's state h_t reads the encoder's states s_j, and both give the logits:

    .. code-block:: text

        c_t = sum_j softmax_j(<h_t, W s_j> / sqrt(dim)) s_j,    logits = E tanh(V [h_t ; c_t])

    Source: Cho et al., EMNLP 2014, and Sutskever et al., NeurIPS 2014, without attention; Luong et al., EMNLP 2015,
    with it (global attention, "general" scores).
    """

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        options: dict[str, Any] = {"batch_first": True, "dropout": config.dropout if config.layers > 1 else 0.0}
        self.encoder = nn.GRU(config.dim, config.dim // 2, config.layers, bidirectional=True, **options)
        self.decoder = nn.GRU(config.dim, config.dim, config.layers, **options)
        self.scores = nn.Linear(config.dim, config.dim, bias=False) if config.attention else None
        self.mixed = nn.Linear((2 if config.attention else 1) * config.dim, config.dim)
        self.dropout = config.dropout
        self.reset_parameters()

    def forward(self, source: Tensor, source_lengths: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
        """Mean cross-entropy in nats a target unit, ends included; smoothed in training."""
        states, state, allowed = self.encode(source, source_lengths)
        inputs, outputs = self.shifted(target, lengths)
        hidden, _ = self.decoder(self._embedded(inputs), state)
        return self.loss(self.read(hidden, states, allowed), outputs)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(states (B, S, dim), the decoder's start (layers, B, dim), what may be read (B, 1, S))."""
        packed = pack_padded_sequence(self._embedded(source), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, last = self.encoder(packed)
        states, _ = pad_packed_sequence(states, batch_first=True, total_length=source.size(1))
        start = last.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)  # the two directions side by side
        allowed = torch.arange(source.size(1), device=source.device) < lengths.to(source.device)[:, None]
        return states, start.contiguous(), allowed[:, None]

    def read(self, hidden: Tensor, states: Tensor, allowed: Tensor) -> Tensor:
        """(B, T, dim) of what the logits are made, from the decoder's states."""
        hidden = F.dropout(hidden, self.dropout, self.training)
        if self.scores is not None:
            context = attend(hidden, self.scores(states), states, allowed, 0.0, False)
            hidden = torch.cat([hidden, context], -1)
        return self.mixed(hidden).tanh()

    def start(self, source: Tensor, lengths: Tensor) -> RNNDecoding:
        """For `glomo.nn.decoding`."""
        return RNNDecoding(self, *self.encode(source, lengths))

    def _embedded(self, tokens: Tensor) -> Tensor:
        return F.dropout(self.embed(tokens), self.dropout, self.training)


class RNNDecoding:
    """A batch being decoded unit by unit."""

    def __init__(self, model: RNNTranslator, states: Tensor, state: Tensor, allowed: Tensor) -> None:
        self.model, self.states, self.state, self.allowed = model, states, state, allowed

    def step(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (B, V) of what follows, once tokens (B,) have been read."""
        hidden, self.state = self.model.decoder(self.model.embed(tokens[:, None]), self.state)
        return self.model.logits(self.model.read(hidden, self.states, self.allowed)[:, 0]).float().log_softmax(-1)

    def select(self, rows: Tensor) -> None:
        """Rows of the batch, in a new order."""
        self.states, self.state, self.allowed = self.states[rows], self.state[:, rows], self.allowed[rows]
