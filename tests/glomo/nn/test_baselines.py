import pytest
import torch

from glomo.errors import UserError
from glomo.nn import BandGraph, GraphTransfer, MatchGraph, NoGraph, UniformGraph

LENGTHS = torch.tensor([5, 3, 1, 0])
TOKENS = torch.ones(4, 5, dtype=torch.long)


def test_uniform_graph_is_the_mean_over_the_true_length():
    features = torch.randn(4, 5, 6)
    transfer = GraphTransfer(UniformGraph(), 6, num_mixtures=1, fusion="none")
    out = transfer(features, LENGTHS, UniformGraph().queries_keys(TOKENS, LENGTHS))
    for row, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            torch.testing.assert_close(out[row, t], features[row, :length].mean(0))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("width", [1, 3, 9])
def test_band_graph_is_the_mean_of_the_neighbours_on_each_side(width):
    features = torch.randn(4, 5, 6)
    graph = BandGraph(width)
    transfer = GraphTransfer(graph, 6, num_mixtures=1, fusion="none")
    before, after = transfer(features, LENGTHS, graph.queries_keys(TOKENS, LENGTHS)).split(6, -1)
    for row, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            for found, sources in (
                (before, range(max(t - width, 0), t)),
                (after, range(t + 1, min(t + width + 1, length))),
            ):
                expected = features[row, list(sources)].mean(0) if len(sources) else torch.zeros(6)
                torch.testing.assert_close(found[row, t], expected)


def test_no_graph_hands_the_features_through():
    features = torch.randn(4, 5, 6)
    for fusion in ("gate", "concat", "none"):
        transfer = GraphTransfer(NoGraph(), 6, fusion=fusion)
        assert transfer.out_dim == 6
        assert transfer(features, LENGTHS, NoGraph().queries_keys(TOKENS, LENGTHS)) is features
        assert not list(transfer.parameters())


def test_statistics_of_the_controls():
    (uniform,) = UniformGraph().queries_keys(TOKENS, LENGTHS)
    assert uniform.statistics(LENGTHS) == (25 + 9 + 1, 0, 9, 0)
    forward, _ = BandGraph(1).queries_keys(TOKENS, LENGTHS)
    assert forward.statistics(LENGTHS) == (10 + 3, 6 + 1, 4 + 2, 0)


def test_band_needs_a_width():
    with pytest.raises(UserError, match="0"):
        BandGraph(0)


def test_match_graph_is_the_mean_of_the_equal_units_elsewhere():
    torch.manual_seed(0)
    features, tokens = torch.randn(3, 6, 4), torch.tensor([[3, 4, 3, 5, 3, 1], [1, 1, 7, 7, 7, 7], [2, 0, 0, 0, 0, 0]])
    lengths = torch.tensor([6, 4, 1])
    transfer = GraphTransfer(MatchGraph(), 4, num_mixtures=1, fusion="none")
    out = transfer(features, lengths, MatchGraph().queries_keys(tokens, lengths))
    for row, length in enumerate(lengths.tolist()):
        units = tokens[row, :length].tolist()
        for t, unit in enumerate(units):
            places = [j for j in range(length) if j != t and units[j] == unit and unit > 1]
            expected = features[row, places].mean(0) if places else torch.zeros(4)
            torch.testing.assert_close(out[row, t], expected)
