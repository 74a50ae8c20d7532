import pytest
import torch

from glomo.nn import GLoMoConfig, GraphPredictor
from glomo.nn.graph_predictor import GraphDirection

SEQUENCES = ([3, 7, 2, 9, 4, 11], [5, 2, 12], [8])


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"sparsity": "threshold", "distance_bias": 2},
        {"activation": "softmax"},
        {"activation": "uniform"},
        {"coupled": True},
        {"masked_sources": (2, 3)},
    ],
    ids=str,
)
def test_graphs_are_the_oracles_in_the_order_of_the_text(oracle, switches):
    model = oracle.small("paper", **switches)
    tokens, lengths = oracle.batch(*SEQUENCES)
    found = model.graph_predictor.graphs(tokens, lengths)
    assert found.shape == (3, 2, 4, 6, 6)
    for row, ids in enumerate(SEQUENCES):
        size = len(ids)
        for direction in range(2):
            graphs, _ = oracle.run_direction(model, direction, ids[::-1] if direction else ids)
            for n, graph in enumerate(g for layer in graphs for g in layer):
                expected = torch.zeros(6, 6, dtype=torch.float64)
                expected[:size, :size] = graph.flip(0, 1) if direction else graph
                torch.testing.assert_close(found[row, direction, n], expected, rtol=1e-9, atol=1e-12)


def test_forward_reads_earlier_and_backward_later_units_and_nobody_itself(oracle):
    model = oracle.small("released")
    forward, backward = model.graph_predictor.graphs(*oracle.batch(*SEQUENCES)).unbind(1)
    assert torch.all(forward.triu() == 0)
    assert torch.all(backward.tril() == 0)
    assert forward.sum() > 0
    assert backward.sum() > 0


def test_uniform_is_one_over_the_number_of_earlier_units(oracle):
    model = oracle.small("paper", activation="uniform", eps=0.0)
    graph = model.graph_predictor.graphs(*oracle.batch([1, 2, 3, 4]))[0, 0, 0]
    expected = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]])
    torch.testing.assert_close(graph, expected.double())
    assert not list(model.graph_predictor.directions.parameters())


def test_masked_units_are_read_by_nobody(oracle):
    model = oracle.small("paper", masked_sources=(2, 9))
    tokens, lengths = oracle.batch(*SEQUENCES)
    graphs = model.graph_predictor.graphs(tokens, lengths)
    masked = torch.isin(tokens, torch.tensor([2, 9]))
    assert torch.all(graphs.movedim(-1, 1)[masked] == 0)
    assert graphs[0].sum() > 0


def test_distance_bias_is_clipped(oracle):
    """With nothing but the distance bias in the score, the graph is made of its squares."""
    model = oracle.small("paper", distance_bias=2, layers=1, heads=1, initial_bias=0.0, eps=0.0)
    g = model.graph_predictor.directions[0]
    for parameter in g.parameters():
        parameter.data.zero_()
    g.distance.data = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    graph = model.graph_predictor.graphs(*oracle.batch([1, 2, 3, 4]))[0, 0, 0]
    torch.testing.assert_close(graph[3], torch.tensor([4, 4, 1, 0], dtype=torch.float64) / 9)


def test_the_bias_of_equal_units(oracle):
    """With nothing else in the score, row t has the squares of what stands for x_j = x_t and for x_{j-1} = x_t."""
    model = oracle.small("paper", equal_bias=True, layers=1, heads=1, initial_bias=0.0, eps=0.0)
    for g in model.graph_predictor.directions:
        for parameter in g.parameters():
            parameter.data.zero_()
        g.equal.data = torch.tensor([[0.1], [0.2]], dtype=torch.float64)
    forward, backward = model.graph_predictor.graphs(*oracle.batch([5, 6, 5, 5, 7, 5]))[0, :, 0] * 10
    # x_5 = 5 is at 0, 2, 3 as well, and follows a 5 at 1, 3, 4
    torch.testing.assert_close(forward[5], torch.tensor([1, 4, 1, 9, 4, 0], dtype=torch.float64) * 10 / 19)
    assert not forward[4].any()  # there is no 7 before
    # from the end: x_0 = 5 is at 2, 3, 5 as well, and what stands before a 5 is at 1, 2, 4
    torch.testing.assert_close(backward[0], torch.tensor([0, 4, 9, 1, 4, 1], dtype=torch.float64) * 10 / 19)


@pytest.mark.parametrize("sparsity", ["bias", "threshold"])
def test_the_start_bias_keeps_rows_alive(sparsity):
    """A row that starts dead has no gradient and stays dead."""
    tokens, lengths = torch.randint(2, 100, (4, 30)), torch.tensor([30, 20, 30, 7])
    dead = []
    for start in (1.0, -1.0):
        torch.manual_seed(0)
        sizes = {"vocab_size": 100, "dim": 64, "heads": 4, "head_dim": 32}
        config = GLoMoConfig.preset("paper", sparsity=sparsity, initial_bias=start, **sizes)
        dead.append(GraphPredictor(config)(tokens, lengths)[0].statistics(lengths).share_dead)
    assert dead[0] < 0.02
    assert dead[1] > 0.1


def test_threshold_weights_and_embeddings_start_symmetric_around_zero():
    """`uniform_(x)` with one argument would draw from x to 1: the bound has to be given twice."""
    config = GLoMoConfig.preset("released", vocab_size=500, dim=32, heads=2, head_dim=64, layers=20)
    predictor = GraphPredictor(config)
    weights = [(g.threshold_weight, config.head_dim**-0.5) for g in predictor.directions]
    for weight, bound in [*weights, (predictor.embedding.weight, 0.1)]:
        assert weight.abs().max() <= bound
        assert weight.min() < -0.95 * bound
        assert weight.max() > 0.95 * bound
        assert weight.mean().abs() < 4 * bound / (3 * weight.numel()) ** 0.5  # four standard errors


def test_the_threshold_depends_on_the_target_and_is_shared_by_the_heads_of_a_layer(oracle):
    model = oracle.small("released")
    graphs, _ = model.graph_predictor(*oracle.batch([3, 7, 2, 9]))
    g = model.graph_predictor.directions[0]
    for n in range(4):
        expected = -(graphs.query[0, n] @ g.threshold_weight[n // 2] + g.threshold[n // 2])
        torch.testing.assert_close(graphs.bias[0, n, :, 0], expected)


def test_gradcheck(oracle):
    model = oracle.small("released", layers=2, heads=1, dim=2, head_dim=2, conv_blocks=1, kernel_size=2)
    g = model.graph_predictor.directions[0]

    def graphs(x):
        found = g(torch.tensor([[3, 4, 3]]), x)
        return found.query, found.key, found.bias

    assert torch.autograd.gradcheck(graphs, torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True))


def test_start_values():
    def direction(**switches):
        torch.manual_seed(0)
        return GraphDirection(GLoMoConfig(vocab_size=20, dim=8, layers=2, heads=4, head_dim=4, **switches))

    start = direction(distance_bias=5, distance_start="slopes").distance.unflatten(0, (2, 4))
    assert start[:, 0].tolist() == [[0.0, -2.0, -4.0, -6.0, -8.0]] * 2
    assert start[:, 1].tolist() == [[0.0, -0.5, -1.0, -1.5, -2.0]] * 2
    assert not start[:, 2:].any()
    plain, tied = direction(), direction(tied_start=True, start_gain=3.0)
    torch.testing.assert_close(tied.to_query.weight, 3 * plain.to_query.weight)
    assert torch.equal(tied.to_query.weight, tied.to_key.weight)
    for name, value in tied.query_cnn.state_dict().items():
        assert torch.equal(value, tied.key_cnn.state_dict()[name])
    graphs = tied(torch.tensor([[3, 4, 5, 3]]), torch.randn(1, 4, 8))
    assert torch.equal(graphs.query, graphs.key)  # then scores are greatest between equal contexts


def test_keys_before_see_no_unit_of_their_own(oracle):
    direction = oracle.small("paper", keys_before=True).graph_predictor.directions[0]
    x = torch.randn(1, 6, direction.config.dim, dtype=direction.to_key.weight.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(direction(torch.arange(6)[None], x).key[0, :, 3].sum(), x)
    reached = gradient[0].abs().sum(-1) > 0
    assert reached.tolist() == [True, True, True, False, False, False]
