"""The graph predictor g: from unit ids to the graphs of both directions."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn.config import GLoMoConfig
from glomo.nn.feature_predictor import FeaturePredictor
from glomo.nn.graphs import Graphs, reverse

EQUAL_SCALE = 10.0
"""The numbers of `equal_bias` are parameters times this: at the rate of all other parameters they would take thousands
of steps to the size at which one equal unit outweighs a hundred others."""


class CausalCNN(nn.Module):
    """Blocks of convolution, normalisation and ReLU; position t sees positions <= t only. `(B, T, d)` to the same.

    Every convolution pads on the left alone, and the normalisation looks at one position at a time, in training and
    evaluation alike. (A symmetric convolution, or BatchNorm over time, would show a unit to what predicts it.)
    """

    def __init__(self, dim: int, blocks: int, kernel_size: int, norm: str) -> None:
        super().__init__()
        self.pad = kernel_size - 1
        self.convs = nn.ModuleList(nn.Conv1d(dim, dim, kernel_size) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if norm == "layer" else nn.Identity() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(F.pad(x.transpose(1, 2), (self.pad, 0))).transpose(1, 2)
            x = norm(x).relu()
        return x


class GraphDirection(nn.Module):
    """g for one direction: embedded units `(B, T, d)` to queries and keys of all layers and heads.

    The key network and the query network run once; linear maps per layer make its heads from them. The score bias is
    b_l, or -(w_l . q + c_l) with w_l shared by the heads of a layer, plus the distance bias where that is on.
    In a coupled model (an ablation) there are no networks: layer l reads the features f^{l-1}, so this module then
    owns the feature predictor that makes them.
    """

    def __init__(self, config: GLoMoConfig) -> None:
        super().__init__()
        self.config = config
        if not config.learns_graphs:
            return
        count = config.layers * config.heads
        if config.coupled:
            self.features = FeaturePredictor(config)
        else:
            self.query_cnn = CausalCNN(config.dim, config.conv_blocks, config.kernel_size, config.norm)
            self.key_cnn = CausalCNN(config.dim, config.conv_blocks, config.kernel_size, config.norm)
        self.to_query = nn.Linear(config.dim, count * config.head_dim)
        self.to_key = nn.Linear(config.dim, count * config.head_dim)
        if config.sparsity == "threshold":
            bound = config.head_dim**-0.5
            self.threshold_weight = nn.Parameter(torch.empty(config.layers, config.head_dim).uniform_(-bound, bound))
            self.threshold = nn.Parameter(torch.full((config.layers,), -config.initial_bias))
        else:
            self.bias = nn.Parameter(torch.full((config.layers,), config.initial_bias))
        if config.distance_bias:
            self.distance = nn.Parameter(torch.zeros(count, config.distance_bias))
            if config.distance_start == "slopes":
                start = self.distance.data.unflatten(0, (config.layers, config.heads))
                for head in range(config.heads // 2):
                    slope = 2 * config.start_gain**2 * 0.25**head
                    start[:, head] = 1 - config.initial_bias - slope * torch.arange(config.distance_bias)
        if config.equal_bias:
            self.equal = nn.Parameter(torch.zeros(2, count))
        for projection in (self.to_query, self.to_key):
            projection.weight.data *= config.start_gain
        if config.tied_start:
            self.key_cnn.load_state_dict(self.query_cnn.state_dict())
            self.to_key.load_state_dict(self.to_query.state_dict())

    def forward(self, tokens: Tensor, x: Tensor, attn_mask: Tensor | None = None, *, reversed: bool = False) -> Graphs:
        config = self.config
        if not config.learns_graphs:
            # scores of a constant 1: every allowed source weighs the same; of 0: no source has a weight
            nothing = x.new_zeros(x.shape[0], config.layers * config.heads, x.shape[1], 1)
            constant = 1.0 if config.activation == "uniform" else 0.0
            return self._graphs(nothing, nothing, constant, tokens, attn_mask, reversed)
        if config.coupled:
            return self._coupled(tokens, x, attn_mask, reversed)
        for_key = self.key_cnn(x)
        if config.keys_before:
            for_key = F.pad(for_key, (0, 0, 1, 0))[:, :-1]
        projected = self._project(self.query_cnn(x), for_key, range(config.layers))
        return self._graphs(*projected, tokens, attn_mask, reversed)

    def _graphs(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | float,
        tokens: Tensor,
        attn_mask: Tensor | None,
        reversed: bool,
        first: int = 0,
    ) -> Graphs:
        """The graphs of these queries and keys, of the layers from `first` on."""
        config = self.config
        activation = "softmax" if config.activation == "softmax" else "relu2"
        scale = config.scale if config.learns_graphs else 1.0
        graphs = Graphs(query, key, bias, attn_mask, config.heads, True, reversed, activation, scale, config.eps)
        if not (config.equal_bias and config.learns_graphs):
            return graphs
        heads = slice(first * config.heads, first * config.heads + query.shape[1])
        return replace(graphs, units=tokens, equal=EQUAL_SCALE * self.equal[:, heads])

    def _project(self, for_query: Tensor, for_key: Tensor, layers: range) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys `(B, N, T, E)` and the bias for a range of layers, from `(B, T, d)` each."""
        config = self.config
        heads = slice(layers.start * config.heads, layers.stop * config.heads)
        rows = slice(heads.start * config.head_dim, heads.stop * config.head_dim)

        def split(x: Tensor, linear: nn.Linear) -> Tensor:
            flat = F.linear(x, linear.weight[rows], linear.bias[rows])
            return flat.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

        query, key = split(for_query, self.to_query), split(for_key, self.to_key)
        if config.sparsity == "threshold":
            per_layer = query.unflatten(1, (len(layers), config.heads))
            threshold = torch.einsum("blhte,le->blht", per_layer, self.threshold_weight[layers.start : layers.stop])
            threshold = threshold + self.threshold[layers.start : layers.stop, None, None]
            bias = -threshold.flatten(1, 2)[..., None]
        else:
            bias = self.bias[layers.start : layers.stop].repeat_interleave(config.heads)[:, None, None]
        if config.distance_bias:
            if config.sparsity == "threshold":
                # The sum of both would be a (B, N, T, T) tensor. So the threshold rides along in the product instead:
                # one more feature of the query, whose partner in the key is one.
                query = torch.cat([query, (bias / config.scale).to(query.dtype)], -1)
                key = torch.cat([key, torch.ones_like(key[..., :1])], -1)
                bias = self._distance(query.shape[2])[heads]
            else:
                bias = bias + self._distance(query.shape[2])[heads]
        return query, key, bias

    def _distance(self, size: int) -> Tensor:
        """`(N, T, T)`: the learned number of distance t - j, clipped to 1..distance_bias."""
        position = torch.arange(size, device=self.distance.device)
        gap = (position[:, None] - position).clamp(1, self.config.distance_bias)
        return self.distance[:, gap - 1]

    def _coupled(self, tokens: Tensor, x: Tensor, attn_mask: Tensor | None, reversed: bool) -> Graphs:
        queries, keys, biases = [], [], []
        for index in range(self.config.layers):
            query, key, bias = self._project(x, x, range(index, index + 1))
            queries.append(query)
            keys.append(key)
            biases.append(bias)
            if index + 1 < self.config.layers:
                graphs = self._graphs(query, key, bias, tokens, attn_mask, reversed, index)
                x = self.features.step(index, graphs, x)
        together = torch.cat(queries, 1), torch.cat(keys, 1), torch.cat(biases, -3)
        return self._graphs(*together, tokens, attn_mask, reversed)


class GraphPredictor(nn.Module):
    """g: unit ids to L * H graphs per direction, in factored form.

    The forward direction's target t reads units before t; the backward direction is a second set of parameters that
    sees each sequence reversed by its true length, so its target reads units after it. No self-loops in either.
    g owns its embedding: a transferred graph is computed from unit ids of its own vocabulary, never from the features
    of the target task. Batches are padded at the end; padding changes nothing (see `Graphs`).
    """

    def __init__(self, config: GLoMoConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim, scale_grad_by_freq=config.scale_grad_by_freq)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.directions = nn.ModuleList([GraphDirection(config), GraphDirection(config)])

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Graphs, Graphs]:
        """`tokens (B, T)`, `lengths (B,)` to the graphs of the forward and of the backward direction."""
        forward, backward = self.embed(tokens, lengths)
        return self.direction(0, tokens, forward), self.direction(1, reverse(tokens, lengths), backward)

    def embed(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The embedded units `(B, T, d)` in the order of each direction."""
        x = self.embedding(tokens)
        if self.config.scaled_embedding:
            x = x * self.config.dim**0.5
        return x, reverse(x, lengths)

    def direction(self, index: int, tokens: Tensor, x: Tensor) -> Graphs:
        """The graphs of direction 0 (forward) or 1 from its units and their embeddings, both in its own order."""
        mask = None
        if self.config.masked_sources:
            masked = torch.tensor(self.config.masked_sources, device=tokens.device)
            mask = ~torch.isin(tokens, masked)[:, None, None, :]
        return self.directions[index](tokens, x, mask, reversed=index == 1)

    def graphs(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """All graphs as one tensor `(B, 2, N, T, T)` in the order of the text; rows of padded targets are zero.

        For plots and small checks: its size is quadratic in T.
        """
        forward, backward = (graphs.materialise() for graphs in self(tokens, lengths))
        # both axes of the backward graphs run from the end: turn targets, then sources
        backward = reverse(backward.transpose(1, 2), lengths)
        backward = reverse(backward.transpose(1, 3), lengths).permute(0, 2, 3, 1)
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device)[:, None]
        return torch.stack([forward, backward], 1) * valid[:, None, None, :, None]
