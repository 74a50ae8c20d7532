"""The feature predictor f: features that travel along the graphs, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glomo.nn.config import GLoMoConfig
from glomo.nn.graphs import Graphs


class FeaturePredictor(nn.Module):
    """`f^l_t = v(sum_j A^l[t, j] f^{l-1}_j, f^{l-1}_t)`, f^0 the embedded units.

    Head h aggregates the h-th of `heads` equal slices of the features (of W_l f^{l-1} with `value_projection`), so all
    heads together give back d features.
    `v` is one GRU cell shared by the layers, with f^{l-1} as its hidden state and as its input the aggregate a
    (`update="gru"`) or [a * f ; a] (`"gru_product"`), or a linear map per layer with residual (`"linear"`).
    """

    def __init__(self, config: GLoMoConfig) -> None:
        super().__init__()
        self.config = config
        if config.update == "linear":
            self.linears = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(config.layers))
        else:
            self.cell = nn.GRUCell(config.dim * (2 if config.update == "gru_product" else 1), config.dim)
        if config.value_projection:
            self.values = nn.ModuleList(nn.Linear(config.dim, config.dim, bias=False) for _ in range(config.layers))
        if config.norm_aggregate:
            self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in range(config.layers))

    def forward(self, x: Tensor, graphs: Graphs) -> Tensor:
        """f^L `(B, T, d)` from the embedded units `x (B, T, d)` and the graphs of all layers, in the graphs' order."""
        for index in range(self.config.layers):
            x = self.step(index, graphs.layer(index), x)
        return x

    def step(self, index: int, graphs: Graphs, x: Tensor) -> Tensor:
        """f^l from f^{l-1} `(B, T, d)` and the graphs of layer `index` (0-based)."""
        value = self.values[index](x) if self.config.value_projection else x
        value = value.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
        aggregate = graphs.attend(value).transpose(1, 2).flatten(2)
        if self.config.norm_aggregate:
            aggregate = self.norms[index](aggregate)
        if self.config.update == "linear":
            return x + self.linears[index](aggregate)
        if self.config.update == "gru_product":
            aggregate = torch.cat([aggregate * x, aggregate], -1)
        return self.cell(aggregate.flatten(0, 1), x.flatten(0, 1)).unflatten(0, x.shape[:2])
