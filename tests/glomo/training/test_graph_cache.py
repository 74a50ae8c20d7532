"""Cached graphs are the graphs, whatever their biases and masks."""

import pytest
import torch

from glomo.data import Vocabulary, pad
from glomo.nn import BandGraph, GLoMoConfig, NoGraph, TunedGraph, random_graph
from glomo.training import graph_cache
from glomo.training.graph_cache import GraphCache

CPU = torch.device("cpu")


@pytest.mark.parametrize("limit", [0, 2**30])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sparsity": "threshold"},
        {"distance_bias": 3},
        {"distance_bias": 3, "sparsity": "threshold", "masked_sources": (4,)},
        {"equal_bias": True},
        {"activation": "softmax"},
        {"activation": "uniform"},
        {"coupled": True},
    ],
)
def test_a_batch_is_what_the_graph_gives(settings, limit, monkeypatch):
    monkeypatch.setattr(graph_cache, "LIMIT", limit)
    monkeypatch.setattr(graph_cache, "CHUNK", 2)
    vocabulary = Vocabulary.build(["a b c d e f"], 100)
    config = GLoMoConfig(vocab_size=len(vocabulary), dim=8, layers=2, heads=2, head_dim=4, conv_blocks=1, **settings)
    graph = random_graph(config, vocabulary, 0)
    for parameter in graph.parameters():  # some start at zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    texts = [[2, 3, 4, 5, 6, 7, 2], [3], [4, 4, 2, 5], [7, 6], [2, 4, 3]]
    cache = GraphCache(graph, texts, CPU)
    for indices in ([0, 1], [3, 2], [1], [4, 0, 2, 2]):
        ids, lengths = pad([texts[i] for i in indices])
        for found, expected in zip(cache.batch(indices), graph.queries_keys(ids, lengths), strict=True):
            assert found.query.shape == expected.query.shape
            valid = (torch.arange(ids.shape[1]) < lengths[:, None])[:, None, :, None]
            torch.testing.assert_close(found.materialise() * valid, expected.materialise() * valid)


def test_a_tuned_graph_is_computed_anew():
    vocabulary = Vocabulary.build(["a b c d e f"], 100)
    config = GLoMoConfig(vocab_size=len(vocabulary), dim=8, layers=2, heads=2, head_dim=4, conv_blocks=1)
    graph = TunedGraph(random_graph(config, vocabulary, 0).graph_predictor, vocabulary)
    cache = GraphCache(graph, [[2, 3, 4], [5, 6]], CPU)
    before = cache.batch([0])[0]
    assert before.query.requires_grad
    for parameter in graph.parameters():
        parameter.data += 0.1
    assert not torch.equal(cache.batch([0])[0].query, before.query)


def test_other_graphs_pass_through():
    assert GraphCache(NoGraph(), [[2]], CPU).batch([0]) == ()
    assert len(GraphCache(BandGraph(2), [[2, 3], [4]], CPU).batch([0, 1])) == 2
