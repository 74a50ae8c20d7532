"""A classifier of documents on the encoder of a language model: ULMFiT's, and the same on a Transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTM, LSTMLanguageModel, activation_sums
from glomo.nn.embedded import PAD
from glomo.nn.losses import smoothed_cross_entropy
from glomo.nn.pooling import Chunk, PoolingHead, pooled_documents
from glomo.nn.transformer import LanguageModel
from glomo.training.old_predictions import OldPredictions
from glomo.transfer import ScalarMix

AnyLanguageModel = LanguageModel | LSTMLanguageModel

BESIDE = ("adversary", "others", "embeddings", "old_head")
"""Parts of a classifier that are of no use behind the training."""


class DocumentClassifier(nn.Module):
    """Concat pooling over the features of a language model's units, then two blocks of BatchNorm, dropout and linear.

    Documents of any length are read in chunks (`glomo.nn.pooling.pooled_documents`): an LSTM goes on from the chunk
    before, a Transformer reads each for itself.

    Args:
        language_model: the encoder; its decoder serves the auxiliary loss.
        classes: how many, or how many numbers the head gives where `labels` makes logits of them.
        hidden, dropouts: of `PoolingHead`.
        chunk: units read at a time.
        window: how many chunks of a document have gradients.
        layers: "last", or "mix": a learned `ScalarMix` of the embeddings and all layers, which must be of one width.

    Raises:
        UserError: a mix of layers of different widths; chunks longer than a Transformer reads.

    Source: Howard & Ruder, ACL 2018, section 3.3.
    """

    def __init__(
        self,
        language_model: AnyLanguageModel,
        classes: int,
        hidden: int = 50,
        dropouts: tuple[float, float] = (0.4, 0.1),
        chunk: int = 70,
        window: int = 20,
        layers: str = "last",
    ) -> None:
        super().__init__()
        self.language_model = language_model
        config = language_model.config
        if isinstance(language_model, LanguageModel):
            longest = language_model.config.max_length
            if chunk > longest:
                raise UserError(f"classifier.chunk is {chunk}; the Transformer reads at most {longest} units at a time")
            widths = [config.dim] * (config.layers + 1)
        else:
            widths = [config.dim, *[language_model.config.hidden] * (config.layers - 1), config.dim]
        if layers == "mix" and len(set(widths)) > 1:
            raise UserError(
                f"classifier.layers is 'mix', but the layers are {', '.join(map(str, widths))} wide; one width is "
                "needed (lstm.hidden equal to lstm.dim)"
            )
        self.mix = ScalarMix(len(widths)) if layers == "mix" else None
        self.head: nn.Module = PoolingHead(3 * config.dim, classes, hidden, dropouts)
        self.chunk, self.window = chunk, window
        self.adversary: nn.Module | None = None  # a classifier of domains, while there are two
        self.others: nn.ModuleDict | None = None  # heads of other tasks, while they learn along
        self.embeddings: nn.ModuleDict | None = None  # theirs, where they have units of their own
        self.old_head: nn.Module | None = None  # that of an older task, while it learns along
        self.labels: nn.Module | None = None  # classes by [names]: what the head says -> logits

    def forward(self, units: Tensor, lengths: Tensor) -> Tensor:
        """units (B, T), padded behind their lengths (B,), at least 1 each -> logits (B, classes)."""
        said = self.head(self.pooled(units, lengths)[0])
        return said if self.labels is None else self.labels(said)

    def pooled(
        self, units: Tensor, lengths: Tensor, auxiliary: float = 0.0, predictions: OldPredictions | None = None
    ) -> tuple[Tensor, Tensor]:
        """(features (B, 3 dim), which the head reads; what comes on top of the loss of the labels). The latter is the
        mean over the documents of

        .. code-block:: text

            auxiliary * nats a unit of the language model
                + alpha mean_t(d_t^2) + beta mean_t((h_t - h_{t-1})^2)          (an LSTM's penalties, in training)
                + strength mean_t KL(p0 || p)                                   (of `predictions`)

        over the units that have gradients, within chunks: what a document adds does not depend on the others.
        """
        model, latest = self.language_model, list[Any]()
        extra = units.new_zeros((), dtype=torch.float32)
        sums: list[Tensor] = []  # an LSTM's penalties, of each document
        lengths = lengths.to(units.device)
        chunks = (lengths + self.chunk - 1) // self.chunk
        learning = lengths - (chunks - self.window).clamp(min=0) * self.chunk  # units with a gradient

        def encode(part: Tensor, state: Any) -> tuple[Tensor, Any]:
            if isinstance(model, LSTMLanguageModel):
                depth = model.config.layers  # behind the state of so many layers is that of the old predictions
                found = model.encoder(part, state and state[:depth])
                latest[:] = [found, found.dropped]
                old = predictions.read(part, state and state[depth:]) if predictions is not None else (None, [])
                latest.append(old[0])
                return (found.raw if self.mix is None else self.mix(found.layers)), [*found.state, *old[1]]
            layers = model.layers(part) if self.mix is not None else [model.hidden(part)]
            latest[:] = [None, layers[-1], predictions.read(part)[0] if predictions is not None else None]
            return (layers[0] if self.mix is None else self.mix(layers)), None

        def observe(chunk: Chunk) -> None:
            nonlocal extra, sums
            if latest[0] is not None and self.training:
                own = [x.float() for x in activation_sums(latest[0], chunk.real)]
                sums = sums or [x.new_zeros(len(units)) for x in own]
                sums = [total.index_add(0, chunk.rows, x) for total, x in zip(sums, own, strict=True)]
            if auxiliary:
                shares = auxiliary / len(units) / learning[chunk.rows]
                extra = extra + self._nats(latest[1], chunk, units, lengths, shares)
            if predictions is not None:
                each = predictions.distances(model.logits(latest[1]), latest[2], chunk.real)
                extra = extra + predictions.note((each / learning[chunk.rows]).sum() / len(units))

        pooled = pooled_documents(encode, units, lengths, self.chunk, self.window, observe)
        if isinstance(model, LSTMLanguageModel) and sums:
            size, places, change, pairs = sums
            alpha, beta = model.config.activation_reg, model.config.temporal_reg
            extra = extra + (alpha * size / places.clamp(min=1) + beta * change / pairs.clamp(min=1)).mean()
        return pooled, extra

    def _nats(self, features: Tensor, chunk: Chunk, units: Tensor, lengths: Tensor, shares: Tensor) -> Tensor:
        """The sum over the chunk of the nats of what follows each unit, the next one or the end, times the document's
        share."""
        model = self.language_model
        after = chunk.starts[:, None] + torch.arange(1, chunk.units.size(1) + 1, device=units.device)
        last = after == lengths[chunk.rows, None]
        following = units[chunk.rows[:, None], after.clamp(max=units.size(1) - 1)].masked_fill(last, model.end)
        following = following.masked_fill(~chunk.real, PAD)
        if isinstance(model, LSTMLanguageModel):
            weight, bias = model.encoder.embedding.weight, model.decoder.bias
        else:
            weight, bias = model.embedding.weight, None
        each = shares[:, None].expand(following.shape)
        return smoothed_cross_entropy(features, weight, following, 0.0, PAD, bias, each)


def reader(model: AnyLanguageModel) -> AWDLSTM | LanguageModel:
    """The part of a language model that has its embedding."""
    return model.encoder if isinstance(model, LSTMLanguageModel) else model


def layer_patterns(model: DocumentClassifier, of_language_model: Mapping[str, str]) -> dict[str, str]:
    """The layer groups, from the bottom to the top: those of the language model, and the head.

    An LSTM's decoder has no part in a classifier's features and is of the head's group: the auxiliary loss trains it.
    """
    lower = {name: rf"language_model\.(?:{pattern})" for name, pattern in of_language_model.items()}
    added = [name for name in ("mix", "labels", *BESIDE) if getattr(model, name) is not None]
    top = ["head", *added, *filter(None, [lower.pop("decoder", None)])]
    return {**lower, "head": "|".join(top)}
