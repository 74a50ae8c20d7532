"""The Transformer of Vaswani et al. (NeurIPS 2017) on glomo's attention: encoder and decoder, and the decoder alone as
a language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glomo.nn.baselines import GraphSource
from glomo.nn.embedded import Embedded
from glomo.nn.graphs import Graphs
from glomo.nn.transformer_config import TransformerConfig
from glomo.nn.transformer_layers import Cache, Context, Stack


class Transformer(Embedded):
    """Sequence to sequence: an encoder over the source and a causal decoder that reads it, with one vocabulary and one
    matrix for source, target and output, as published (section 3.4).

    Args:
        config: the settings.
        graph: what layers of the kind "graph" mix; the source's units must be of its vocabulary. It is not kept.
    """

    config: TransformerConfig

    def __init__(self, config: TransformerConfig, graph: GraphSource | None = None) -> None:
        super().__init__(config)
        self.encoder = Stack(config, config.kinds("encoder_attention"), graph=graph)
        self.decoder = Stack(config, config.kinds("decoder_attention"), over_memory=True)
        self.reset_parameters()

    def forward(
        self, source: Tensor, source_lengths: Tensor, target: Tensor, lengths: Tensor, graphs: Sequence[Graphs] = ()
    ) -> Tensor:
        """Mean cross-entropy in nats a target unit, ends included; smoothed in training.

        source (B, S) and target (B, T) are padded with 0 behind their lengths (B,).
        """
        memory = self.encode(source, source_lengths, graphs)
        inputs, outputs = self.shifted(target, lengths)
        # padding stands at the end: no unit of the sequence reads it
        return self.loss(self.decoder(self.embed(inputs), Context(causal=True), memory), outputs)

    def encode(self, source: Tensor, lengths: Tensor, graphs: Sequence[Graphs] = ()) -> Context:
        """What the decoder reads."""
        allowed = (torch.arange(source.size(1), device=source.device) < lengths.to(source.device)[:, None])[
            :, None, None
        ]
        memory = self.encoder(self.embed(source), Context(allowed, lengths=lengths, graphs=graphs))
        return Context(allowed, memory=memory)

    def start(self, source: Tensor, lengths: Tensor, graphs: Sequence[Graphs] = ()) -> Decoding:
        """For `glomo.nn.decoding`."""
        return Decoding(self, self.decoder, self.encode(source, lengths, graphs))


class LanguageModel(Embedded):
    """The decoder without a source: predicts every unit from those before it."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.decoder = Stack(config, config.kinds("decoder_attention"))
        self.reset_parameters()

    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Mean cross-entropy in nats a unit of what follows each of the inputs, both (B, T); where outputs are padding
        (0) nothing is asked. `shifted` makes the two of sequences; smoothed in training."""
        return self.loss(self.hidden(inputs), outputs)

    def hidden(self, inputs: Tensor) -> Tensor:
        """(B, T) -> (B, T, dim), the last layer's features."""
        return self.decoder(self.embed(inputs), Context(causal=True))

    def layers(self, inputs: Tensor) -> list[Tensor]:
        """The same of the embeddings, with their positions, and of all layers."""
        found: list[Tensor] = []
        self.decoder(self.embed(inputs), Context(causal=True), outputs=found)
        return found

    def start(self) -> Decoding:
        """For `glomo.nn.decoding`."""
        return Decoding(self, self.decoder, None)


class Decoding:
    """A batch being decoded unit by unit, with what the layers computed of the units so far."""

    def __init__(self, model: Embedded, decoder: Stack, memory: Context | None) -> None:
        self.model, self.decoder, self.memory = model, decoder, memory
        self.caches = [Cache() for _ in decoder.layers]
        self.length = 0

    def step(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (B, V) of what follows, once tokens (B,) have been read."""
        x = self.model.embed(tokens[:, None])
        hidden = self.decoder(x, Context(), self.memory, self.caches, self.length)
        self.length += 1
        return self.model.logits(hidden[:, 0]).float().log_softmax(-1)

    def select(self, rows: Tensor) -> None:
        """Rows of the batch, in a new order."""
        for cache in self.caches:
            cache.select(rows)
        if self.memory is not None and self.memory.allowed is not None:
            self.memory = self.memory._replace(allowed=self.memory.allowed[rows])
