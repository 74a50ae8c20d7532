"""A graph predictor after training: frozen, with the vocabulary its unit ids mean something in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from glomo.errors import UserError
from glomo.nn.config import GLoMoConfig
from glomo.nn.graph_predictor import GraphPredictor
from glomo.nn.graphs import Graphs


class FrozenGraph(nn.Module):
    """A transferable graph: a copy of `graph_predictor` that never trains, and its vocabulary.

    Always in evaluation mode, whatever `train()` says around it; no parameter takes a gradient and none flows through
    it. It reads unit ids of *its* vocabulary (`graph.vocabulary.encode(text)`) through its own embedding, so a target
    task must split its text with this vocabulary, whatever features it then puts on the units.

    cut: what every score is lowered by, r = relu(s - cut): weak links fall away, and rows without a strong one are
        zero. 0 is the graph as it was learned; softmax graphs, which no constant changes, stay as they are. It may be
        set later, before graphs are computed and kept, and is not saved.

    Raises `UserError` when the vocabulary's size is not the predictor's.
    """

    def __init__(self, graph_predictor: GraphPredictor, vocabulary: Any, cut: float = 0.0) -> None:
        super().__init__()
        if len(vocabulary) != graph_predictor.config.vocab_size:
            raise UserError(
                f"the vocabulary has {len(vocabulary)} units and the graph predictor's embedding "
                f"{graph_predictor.config.vocab_size}; a graph needs the vocabulary it was trained with."
            )
        self.graph_predictor = copy.deepcopy(graph_predictor).requires_grad_(False)
        self.vocabulary, self.cut = vocabulary, cut
        self.train(False)

    @property
    def config(self) -> GLoMoConfig:
        return self.graph_predictor.config

    @property
    def num_layers(self) -> int:
        return self.config.layers

    @property
    def num_heads(self) -> int:
        return self.config.heads

    @property
    def num_directions(self) -> int:
        return 2

    def train(self, mode: bool = True) -> FrozenGraph:
        """Stays in evaluation mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def queries_keys(self, token_ids: Tensor, lengths: Tensor) -> tuple[Graphs, Graphs]:
        """The graphs of both directions over `token_ids (B, T)`, in factored form, for `GraphTransfer`.

        They depend on nothing that trains, so they may be computed once per sentence and kept.
        """
        return self._graphs(token_ids, lengths)

    def _graphs(self, token_ids: Tensor, lengths: Tensor) -> tuple[Graphs, Graphs]:
        forward, backward = (
            replace(graphs, bias=graphs.bias - self.cut) for graphs in self.graph_predictor(token_ids, lengths)
        )
        return forward, backward

    @classmethod
    def restore(cls, config: Mapping[str, Any], vocabulary: Any, state: Mapping[str, Tensor]) -> FrozenGraph:
        """From what a checkpoint holds: the model's settings, the vocabulary and the weights.

        `state` is a state dict of `GLoMo` or of `FrozenGraph`; weights other than the graph predictor's are left out.
        Raises `UserError` when the weights are not those of `config`.
        """
        prefix = "graph_predictor."
        weights = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        predictor = GraphPredictor(GLoMoConfig.from_dict(dict(config)))
        expected = predictor.state_dict()
        for name in expected.keys() | weights.keys():
            needed = tuple(expected[name].shape) if name in expected else "absent"
            found = tuple(weights[name].shape) if name in weights else "absent"
            if needed != found:
                raise UserError(f"the saved weight {prefix}{name} is {found}; the saved settings need {needed}.")
        predictor.load_state_dict(weights)
        return cls(predictor, vocabulary)


class TunedGraph(FrozenGraph):
    """A copy of a graph predictor that learns with the task it is used in: gradients flow into all that `FrozenGraph`
    keeps still. It has to be among the modules whose parameters the optimiser has."""

    def __init__(self, graph_predictor: GraphPredictor, vocabulary: Any, cut: float = 0.0) -> None:
        super().__init__(graph_predictor, vocabulary, cut)
        self.requires_grad_(True)

    def queries_keys(self, token_ids: Tensor, lengths: Tensor) -> tuple[Graphs, Graphs]:
        """The graphs of both directions, as those of `FrozenGraph`; they change as it learns."""
        return self._graphs(token_ids, lengths)


def random_graph(config: GLoMoConfig, vocabulary: Any, seed: int, cut: float = 0.0) -> FrozenGraph:
    """The control "random g": a graph predictor with its start weights, drawn from `seed`, never trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FrozenGraph(GraphPredictor(config), vocabulary, cut)
