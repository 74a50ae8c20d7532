"""What models of sequences of units share: one matrix for what they read and what they predict."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn.losses import smoothed_cross_entropy

PAD = 0


class Settings(Protocol):
    """What is asked of a configuration."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def smoothing(self) -> float: ...


class Embedded(nn.Module):
    """Units as vectors scaled by sqrt(dim), and logits by the same matrix. The unit `end` (the last id) is the model's
    own: it starts and ends every sequence."""

    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.config, self.end = config, config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size + 1, config.dim, padding_idx=PAD)

    def reset_parameters(self) -> None:
        """Xavier's uniform weights, zero biases, embeddings of standard deviation 1 / sqrt(dim)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=self.config.dim**-0.5)
        nn.init.zeros_(self.embedding.weight[PAD].data)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) * self.config.dim**0.5

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V), -inf for padding."""
        logits = F.linear(hidden, self.embedding.weight)
        return logits.masked_fill(torch.arange(logits.size(-1), device=logits.device) == PAD, float("-inf"))

    def shifted(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(what is read, what is predicted), (B, T + 1) each: the sequence behind `end`, and before it."""
        end = torch.full_like(tokens[:, :1], self.end)
        padded = F.pad(tokens, (0, 1))
        return torch.cat([end, tokens], 1), padded.scatter(1, lengths.to(tokens.device)[:, None], self.end)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a unit, smoothed in training."""
        smoothing = self.config.smoothing if self.training else 0.0
        total = smoothed_cross_entropy(hidden, self.embedding.weight, targets, smoothing, PAD)
        return total / (targets != PAD).sum().clamp(min=1)
