"""Transfer: graphs learned on unlabelled text, applied to whatever features the target task has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.errors import UserError
from glomo.nn.baselines import GraphSource
from glomo.nn.graphs import Graphs, reverse


class GatedFusion(nn.Module):
    """`W_1 x * sigmoid(W_2 x)`, biases included: `(..., in_dim) -> (..., out_dim)`."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, 2 * out_dim)  # W_1 over W_2

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.linear(x), dim=-1)


class GraphTransfer(nn.Module):
    """Mixes the graphs of a `graph` and applies them to features H of the target task.

    Per direction, `num_mixtures` mixed graphs of all layers l and heads h and their running products
    Lambda_l,h = A_l,h Lambda_{l-1},h (l > 1, since Lambda_1 = A_1 is there already):

        M = sum m_{l,h} A_{l,h} + sum m'_{l,h} Lambda_{l,h},    (m, m') = softmax over the L*H + (L-1)*H logits

    and then `fuse([H ; s_1 M_1 H ; s_2 M_2 H ; ...])` over all mixtures of all directions, s a learned scale each.
    H may be embeddings, GloVe or contextual vectors, RNN states or pixel features: only its shape `(B, T, dim)` counts.

    graph: sets the numbers of directions, layers and heads (`FrozenGraph`, `UniformGraph`, `BandGraph`, `NoGraph`). It
        is not kept: its output comes in by `forward`, and neither its weights nor its mode belong to this module.
    weights: `"global"`, one softmax for all; `"target"`, m depends on the target, softmax(Linear(H_t)).
    chains: False leaves the products out.
    layers: `"all"`, or `"last"`, the graphs of the last layer only and no products (an ablation).
    fusion: `"gate"`, W_1[H;MH] * sigmoid(W_2[H;MH]) of width `out_dim`; `"concat"`, [H;MH];
        `"none"`, MH alone. Without a graph H passes unchanged in all of them.
    out_dim: the width of `"gate"`, by default `dim`.

    The attribute `out_dim` says how wide the result is.
    """

    def __init__(
        self,
        graph: GraphSource,
        dim: int,
        num_mixtures: int = 2,
        weights: str = "global",
        chains: bool = True,
        layers: str = "all",
        fusion: str = "gate",
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("weights", weights, ("global", "target")),
            ("layers", layers, ("all", "last")),
            ("fusion", fusion, ("gate", "concat", "none")),
        ):
            if value not in choices:
                raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        if num_mixtures < 1:
            raise UserError(f"num_mixtures is {num_mixtures}; it must be at least 1.")
        if out_dim is not None and fusion != "gate":
            raise UserError(f"out_dim is given and fusion is {fusion!r}; only gate has a width of its own.")
        self.num_directions, self.num_mixtures, self.num_heads = graph.num_directions, num_mixtures, graph.num_heads
        self.last_only = layers == "last"
        used_layers = 1 if self.last_only else graph.num_layers
        self.num_graphs = used_layers * graph.num_heads
        self.num_chains = (used_layers - 1) * graph.num_heads if chains else 0
        self.fusion = fusion

        mixed = self.num_directions * num_mixtures * dim
        if not mixed:
            self.out_dim = dim
            return
        count = self.num_graphs + self.num_chains
        if weights == "target":
            self.target_logits = nn.ModuleList(nn.Linear(dim, num_mixtures * count) for _ in range(self.num_directions))
        else:
            self.logits = nn.Parameter(torch.zeros(self.num_directions, num_mixtures, count))
        self.scales = nn.Parameter(torch.ones(self.num_directions, num_mixtures))
        if fusion == "gate":
            self.out_dim = dim if out_dim is None else out_dim
            self.gate = GatedFusion(dim + mixed, self.out_dim)
        else:
            self.out_dim = dim + mixed if fusion == "concat" else mixed

    def forward(self, features: Tensor, lengths: Tensor, graph_inputs: Sequence[Graphs]) -> Tensor:
        """`features (B, T, dim)`, `lengths (B,)` and `graph.queries_keys(token_ids, lengths)` to `(B, T, out_dim)`.

        Padded positions hold finite numbers without meaning, given that `features` are finite there.
        """
        if len(graph_inputs) != self.num_directions:
            raise ValueError(
                f"graph_inputs has {len(graph_inputs)} directions; this module was built for {self.num_directions}"
            )
        if not self.num_directions:
            return features
        mixed: list[Tensor] = []
        for index, graphs in enumerate(graph_inputs):
            h = reverse(features, lengths) if graphs.reversed else features
            graphs = graphs.to(features.dtype)
            if self.last_only:
                graphs = graphs.layer(-1)
            outputs = graphs.mix(h, *self._weights(index, h))
            mixed.extend(
                (reverse(out, lengths) if graphs.reversed else out) * scale
                for out, scale in zip(outputs, self.scales[index], strict=True)
            )
        if self.fusion == "none":
            return torch.cat(mixed, -1)
        together = torch.cat([features, *mixed], -1)
        return self.gate(together) if self.fusion == "gate" else together

    def mixture_weights(self, index: int, features: Tensor) -> Tensor:
        """The softmax of direction `index`: `(M, K)`, or `(M, B, T, K)` per target of `features (B, T, dim)` (in the
        direction's order). K counts the graphs, layer-major, and then the products from layer 2 on."""
        if hasattr(self, "logits"):
            return self.logits[index].softmax(-1)
        logits = self.target_logits[index](features).unflatten(-1, (self.num_mixtures, -1))
        return logits.softmax(-1).movedim(-2, 0)

    def _weights(self, index: int, features: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        weights = self.mixture_weights(index, features)
        graphs, products = weights.split([self.num_graphs, self.num_chains], -1)
        if not self.num_chains:
            return graphs.unbind(), None
        # the ops count a product of layer 1 too
        return graphs.unbind(), F.pad(products, (self.num_heads, 0)).unbind()
