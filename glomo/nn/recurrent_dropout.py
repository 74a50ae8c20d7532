"""Dropout for recurrent layers: of the weights from state to state, and with one mask for all steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightDropLSTM(nn.LSTM):
    """One layer whose weights from state to state are dropped out in training, one mask for all steps of a call:

    .. code-block:: text

        i, f, g, o = W x_t + b + (M * U) h_{t-1} + b',   M = Bernoulli(1 - p) / (1 - p)
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),   h_t = sigmoid(o) tanh(c_t)

    U (`weight_hh_l0`) stays the parameter, and gets the gradient. M * U never enters the module, which would otherwise
    keep it and its graph (`nn.LSTM` remembers a list of its weights).

    Source: Wan et al., ICML 2013 (DropConnect); Merity et al., ICLR 2018, section 2.
    """

    def __init__(self, inputs: int, outputs: int, weight_drop: float = 0.0) -> None:
        super().__init__(inputs, outputs, batch_first=True)
        self.weight_drop = weight_drop

    def forward(  # type: ignore[override]  # packed sequences are not taken
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, inputs) -> (B, T, outputs), and (h, c) (1, B, outputs) after the last step."""
        if not (self.training and self.weight_drop):
            return super().forward(input, hx)
        if hx is None:
            zeros = input.new_zeros(1, input.size(0), self.hidden_size)
            hx = zeros, zeros
        inputs_to, state_to, *biases = self.all_weights[0]
        weights: list[Tensor] = [inputs_to, F.dropout(state_to, self.weight_drop), *biases]
        if input.is_cuda:
            weights = in_one_piece(weights)
        out, h, c = torch.lstm(input, hx, weights, True, 1, 0.0, True, False, True)
        return out, (h, c)


def in_one_piece(weights: list[Tensor]) -> list[Tensor]:
    """The same, one behind the other in memory: what cuDNN asks for, and warns of copying otherwise."""
    pieces = torch.cat([weight.flatten() for weight in weights]).split([weight.numel() for weight in weights])
    return [piece.view_as(weight) for piece, weight in zip(pieces, weights, strict=True)]


def variational_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """(B, T, D) with one mask (B, 1, D) for all steps. Source: Gal and Ghahramani, NeurIPS 2016."""
    return x * F.dropout(x.new_ones(x.size(0), 1, x.size(2)), p) if training and p else x
