"""GLoMo pre-training: graph predictor, feature predictor and context decoder, trained together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glomo.nn.config import GLoMoConfig
from glomo.nn.decoder import ContextDecoder, sample_positions
from glomo.nn.feature_predictor import FeaturePredictor
from glomo.nn.graph_predictor import GraphPredictor
from glomo.nn.graphs import Graphs, dead_row_rescue, graph_l1, reverse


class GLoMo(nn.Module):
    """Learns graphs from unlabelled sequences (Yang et al. 2018, arXiv 1806.05662).

    Two independent models, forward and backward (on reversed sequences), share the embedding. In each, graphs
    from g carry features f^0 = embedding to f^L, and a decoder predicts from f_t^L the `horizon` units that follow t.
    What predicts unit t + 1 depends on units up to t only, in training and evaluation mode.

    With `objective="sentence"` (an ablation) there is one prediction per sequence instead: the mean of f_t^L over the
    first n = max(1, length // 2) units starts the decoder, which predicts all units from the n-th (0-based) to the end.
    `horizon` and `positions` play no part then.

    After training only `graph_predictor` is transferred; see `glomo.nn.FrozenGraph`.
    """

    def __init__(self, config: GLoMoConfig) -> None:
        super().__init__()
        self.config = config
        self.graph_predictor = GraphPredictor(config)
        # a coupled graph predictor makes its queries and keys from features, so it owns what makes them
        self._coupled = config.coupled and config.learns_graphs
        if config.activation == "rnn":
            self.rnns = nn.ModuleList(nn.GRU(config.dim, config.dim, config.layers, batch_first=True) for _ in range(2))
        elif not self._coupled:
            self.feature_predictors = nn.ModuleList([FeaturePredictor(config), FeaturePredictor(config)])
        self.rescue_share = 1.0  # of the weight of the rescue term; not saved
        self.decoders = nn.ModuleList(ContextDecoder(config.dim, config.decoder_layers) for _ in range(2))

    def forward(self, tokens: Tensor, lengths: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The loss, a scalar: the mean of both directions' cross-entropy in nats per predicted unit.

        `tokens (B, T)` int64, padded at the end; `lengths (B,)`. In training mode `config.positions` positions per
        sequence enter, drawn with `generator` as are the units of a sampled softmax, and the terms for dead rows and
        for sparse graphs (weights `config.rescue_weight` and `config.l1_weight`) are added; evaluation takes all
        positions and the cross-entropy alone, so it has no randomness.
        """
        config = self.config
        lengths = lengths.to(tokens.device)
        loss = torch.zeros((), device=tokens.device)
        for index, (units, x, graphs, features) in enumerate(self._directions(tokens, lengths)):
            if config.objective == "sentence":
                start, positions, horizon = _sentence_start(features, lengths)
            else:
                positions = self._positions(units, lengths, generator)
                start = torch.take_along_dim(features, positions[..., None], 1)
                horizon = config.horizon
            weight = self.graph_predictor.embedding.weight
            drawn = (config.sampled_softmax if self.training else 0, generator)
            loss = loss + 0.5 * self.decoders[index](start, positions, horizon, units, lengths, x, weight, *drawn)
            if self.training and config.rescue_weight and self.rescue_share:
                rescue = dead_row_rescue(graphs, lengths, config.rescue_margin, config.rescue_targets, generator)
                loss = loss + 0.5 * config.rescue_weight * self.rescue_share * rescue
            if self.training and config.l1_weight:
                loss = loss + 0.5 * config.l1_weight * graph_l1(graphs, lengths, config.rescue_targets, generator)
        return loss

    def features(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """f^L of the forward and of the backward model, `(B, T, d)` each, both in the order of the text."""
        (_, _, _, forward), (_, _, _, backward) = self._directions(tokens, lengths)
        return forward, reverse(backward, lengths)

    def _directions(self, tokens: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor, Graphs, Tensor]]:
        """Units, their embeddings, graphs and f^L for both directions, each in the direction's own order."""
        found = []
        embedded = self.graph_predictor.embed(tokens, lengths)
        for index, units in enumerate((tokens, reverse(tokens, lengths))):
            graphs = self.graph_predictor.direction(index, units, embedded[index])
            if self.config.activation == "rnn":
                found.append((units, embedded[index], graphs, self.rnns[index](embedded[index])[0]))
                continue
            if self._coupled:
                predictor = self.graph_predictor.directions[index].get_submodule("features")
            else:
                predictor = self.feature_predictors[index]
            found.append((units, embedded[index], graphs, predictor(embedded[index], graphs)))
        return found

    def _positions(self, units: Tensor, lengths: Tensor, generator: torch.Generator | None) -> Tensor:
        batch, size = units.shape
        if self.training and self.config.positions:
            return sample_positions(lengths, size, self.config.positions, generator)
        return torch.arange(max(size - 1, 0), device=units.device).expand(batch, -1)  # the last one has no next unit


def _sentence_start(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean of the first half, the position it ends at, and the units to predict: the unit objective with P = 1."""
    half = (lengths // 2).clamp(min=1)
    first = (torch.arange(features.shape[1], device=features.device) < half[:, None])[..., None]
    mean = (features * first).sum(1, keepdim=True) / half[:, None, None]
    return mean, (half - 1)[:, None], max(1, (features.shape[1] + 1) // 2)
