import pytest
import torch
from torch import nn

from glomo.errors import UserError
from glomo.nn import FrozenGraph, GraphTransfer, TunedGraph, random_graph


class Words:
    """As much of a vocabulary as a frozen graph needs."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


def test_frozen_whatever_happens_around_it(oracle):
    model = oracle.small("released")
    graph = FrozenGraph(model.graph_predictor, Words(13))
    task = nn.ModuleList([graph, nn.Linear(2, 2)]).train()
    assert task[1].training
    assert not any(m.training for m in graph.modules())
    assert not any(p.requires_grad for p in graph.parameters())
    assert all(p.requires_grad for p in model.graph_predictor.parameters())  # the original may go on training
    tokens, lengths = oracle.batch([3, 7, 2], [5, 6])
    before = graph.queries_keys(tokens, lengths)
    model.graph_predictor.embedding.weight.data.zero_()
    after = graph.train().queries_keys(tokens, lengths)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.materialise(), b.materialise())
        assert not a.query.requires_grad


def test_no_gradient_reaches_it_in_a_downstream_step(oracle):
    graph = FrozenGraph(oracle.small("released").graph_predictor, Words(13))
    transfer = GraphTransfer(graph, 5).double()
    tokens, lengths = oracle.batch([3, 7, 2, 4], [5, 6])
    features = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    transfer(features, lengths, graph.queries_keys(tokens, lengths)).sum().backward()
    assert features.grad.abs().sum() > 0
    assert all(p.grad is None for p in graph.parameters())
    assert all(p.grad is not None for p in transfer.parameters())


def test_unit_ids_go_through_its_own_embedding(oracle):
    """The features of the task decide nothing about the graph; the ids do, through g's table."""
    model = oracle.small("released")
    graph = FrozenGraph(model.graph_predictor, Words(13))
    tokens, lengths = oracle.batch([3, 7, 2, 4])
    forward, _ = graph.queries_keys(tokens, lengths)
    ids = tokens[0].tolist()
    expected, _ = oracle.run_direction(model, 0, ids)
    torch.testing.assert_close(forward.materialise()[0, 1], expected[0][1], rtol=1e-9, atol=1e-12)
    graph.graph_predictor.embedding.weight.data[7] += 1
    changed, _ = graph.queries_keys(tokens, lengths)
    assert not torch.equal(changed.materialise(), forward.materialise())


@pytest.mark.parametrize("sparsity", ["bias", "threshold"])
def test_a_cut_lowers_every_score(oracle, sparsity):
    model = oracle.small("paper", sparsity=sparsity, equal_bias=True)
    tokens, lengths = oracle.batch([3, 7, 2, 4, 3, 7], [5, 6])
    graph = FrozenGraph(model.graph_predictor, Words(13), cut=0.3)
    for direction in model.graph_predictor.directions:
        if sparsity == "bias":
            direction.bias.data -= 0.3
        else:
            direction.threshold.data += 0.3
    lowered = FrozenGraph(model.graph_predictor, Words(13))
    for a, b in zip(graph.queries_keys(tokens, lengths), lowered.queries_keys(tokens, lengths), strict=True):
        torch.testing.assert_close(a.materialise(), b.materialise())
        assert a.materialise().any()
    tuned = TunedGraph(model.graph_predictor, Words(13), cut=0.3)
    tuned.graph_predictor.load_state_dict(graph.graph_predictor.state_dict())
    for a, b in zip(graph.queries_keys(tokens, lengths), tuned.queries_keys(tokens, lengths), strict=True):
        assert torch.equal(a.materialise(), b.materialise())
        assert b.query.requires_grad


@pytest.mark.parametrize("switches", [{}, {"coupled": True}, {"distance_bias": 3}], ids=str)
def test_restored_from_the_weights_of_the_whole_model(oracle, switches):
    model = oracle.small("released", **switches).float()
    tokens, lengths = oracle.batch([3, 7, 2, 4], [5, 6])
    graph = FrozenGraph(model.graph_predictor, Words(13))
    for state in (model.state_dict(), graph.state_dict()):
        restored = FrozenGraph.restore(model.config.to_dict(), Words(13), state)
        assert restored.config == model.config
        for a, b in zip(graph.queries_keys(tokens, lengths), restored.queries_keys(tokens, lengths), strict=True):
            assert torch.equal(a.materialise(), b.materialise())


def test_a_vocabulary_of_another_size_is_a_sentence(oracle):
    with pytest.raises(UserError, match=r"12 units.*13"):
        FrozenGraph(oracle.small().graph_predictor, Words(12))


def test_weights_of_other_settings_are_a_sentence(oracle):
    model = oracle.small()
    wrong = {**model.config.to_dict(), "head_dim": 5}
    with pytest.raises(UserError, match=r"to_(key|query).*\(20"):
        FrozenGraph.restore(wrong, Words(13), model.state_dict())
    state = model.state_dict()
    del state["graph_predictor.embedding.weight"]
    with pytest.raises(UserError, match=r"embedding.weight is absent"):
        FrozenGraph.restore(model.config.to_dict(), Words(13), state)


def test_random_graph_depends_on_its_seed_alone(oracle):
    config = oracle.small("released").config
    tokens, lengths = oracle.batch([3, 7, 2, 4])

    def graph(seed):
        return random_graph(config, Words(13), seed).queries_keys(tokens, lengths)[0].materialise()

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = graph(1)
    assert torch.equal(torch.rand(1), expected)  # the caller's generator stands where it stood
    assert torch.equal(first, graph(1))
    assert not torch.equal(first, graph(2))
