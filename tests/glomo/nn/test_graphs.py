import pytest
import torch

from glomo.nn import Graphs, dead_row_rescue, graph_l1, reverse


def test_reverse_turns_each_sequence_by_its_own_length():
    x = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9], [0, 0, 0, 0]])
    lengths = torch.tensor([3, 2, 4, 0])
    expected = torch.tensor([[3, 2, 1, 0], [5, 4, 0, 0], [9, 8, 7, 6], [0, 0, 0, 0]])
    assert torch.equal(reverse(x, lengths), expected)
    deep = torch.randn(4, 4, 2, 3)
    assert torch.equal(reverse(reverse(deep, lengths), lengths), deep)
    assert torch.equal(reverse(deep, lengths)[1, 0], deep[1, 1])


def test_reverse_refuses_lengths_beyond_the_sequences():
    with pytest.raises(ValueError, match="lengths has 5, but the sequences of x are only 4 long"):
        reverse(torch.zeros(2, 4), torch.tensor([5, 2]))


def test_layers_are_layer_major_slices():
    query, key, bias = torch.randn(2, 6, 5, 3), torch.randn(2, 6, 5, 3), torch.randn(6, 1, 1)
    graphs = Graphs(query, key, bias, num_heads=2)
    whole = graphs.materialise()
    assert graphs.num_layers == 3
    for layer in range(3):
        assert torch.equal(graphs.layer(layer).materialise(), whole[:, 2 * layer : 2 * layer + 2])
    assert torch.equal(graphs.layer(-1).materialise(), graphs.layer(2).materialise())


@pytest.mark.parametrize("activation", ["relu2", "softmax"])
def test_rows_are_normalised_strictly_causal_or_zero(activation):
    graphs = Graphs(torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4), 0.1, activation=activation, eps=0.0)
    weights = graphs.materialise()
    assert torch.all(weights.triu() == 0)  # no self-loops, nothing later
    assert torch.all(weights[:, :, 0] == 0)
    total = weights.sum(-1)
    torch.testing.assert_close(total[total > 0], torch.ones_like(total[total > 0]))
    value = torch.randn(2, 3, 6, 2)
    torch.testing.assert_close(graphs.attend(value), weights @ value)


def test_dead_rows_are_zero_with_zero_gradient():
    query = torch.zeros(1, 1, 4, 2, requires_grad=True)
    graphs = Graphs(query, torch.randn(1, 1, 4, 2), -1.0)
    out = graphs.attend(torch.randn(1, 1, 4, 3))
    out.sum().backward()
    assert torch.all(out == 0)
    assert torch.all(query.grad == 0)


def test_statistics_count_true_pairs_only():
    """Scores are written by hand: one sequence of three units, one of two, in a batch of width four."""
    one = torch.ones(2, 1, 4, 1)
    scores = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [-1, 2, 0, 0], [1, 1, 1, 0]]).float()[None, None]
    dead = torch.full((1, 1, 4, 4), -1.0)
    graphs = Graphs(one * 0, one, torch.cat([scores, dead]), num_heads=1)
    found = graphs.statistics(torch.tensor([3, 2]))
    # allowed: (1,0) (2,0) (2,1) in the first sequence, (1,0) in the second
    # zero: (2,0) in the first, (1,0) in the second, which is a dead row
    assert found == (4, 2, 3, 1)
    assert (found.share_zero, found.share_dead) == (0.5, 1 / 3)


def test_statistics_leave_masked_sources_out():
    one = torch.ones(1, 2, 3, 1)
    mask = torch.tensor([False, True, True])[None, None, None]
    found = Graphs(one, one, 0.0, mask, num_heads=2).statistics(torch.tensor([3]))
    assert found == (2, 0, 2, 0)  # target 2 reads source 1, and target 1 has nothing it may read


def test_rescue_pulls_dead_rows_up_and_leaves_others_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 5, 3, requires_grad=True), torch.randn(2, 2, 5, 3)
    lengths = torch.tensor([5, 3])
    low = dead_row_rescue(Graphs(query, key, -50.0), lengths, 0.5, 99)
    (gradient,) = torch.autograd.grad(low, query)
    assert low > 1000
    assert torch.all(gradient[:, :, 0] == 0)  # the first target has no source
    assert torch.all(gradient[1, :, 3:] == 0)  # padding
    assert torch.all(gradient[0, :, 1:].abs().sum(-1) > 0)
    high = dead_row_rescue(Graphs(query, key, 50.0), lengths, 0.5, 99)
    assert high == 0
    assert torch.all(torch.autograd.grad(high, query)[0] == 0)


def test_rescue_of_sampled_targets_estimates_the_whole():
    torch.manual_seed(0)
    graphs = Graphs(torch.randn(3, 2, 9, 4), torch.randn(3, 2, 9, 4), torch.randn(2, 9, 9))
    lengths = torch.tensor([9, 9, 9])
    whole = dead_row_rescue(graphs, lengths, 2.0, 8)
    generator = torch.Generator().manual_seed(0)
    parts = torch.stack([dead_row_rescue(graphs, lengths, 2.0, 2, generator) for _ in range(400)])
    assert parts.std() > 0
    assert parts.mean().item() == pytest.approx(whole.item(), rel=0.1)


@pytest.mark.parametrize("shape", [(), (2, 1, 1), (2, 6, 6), (3, 2, 6, 1)], ids=str)
def test_equal_units_are_a_bias_of_their_own(shape):
    """Against the same bias written out pair by pair: graphs of every layer, attention and the rescue term."""
    torch.manual_seed(0)
    bias = torch.randn(shape) if shape else 0.3
    units = torch.tensor([[3, 4, 3, 4, 4, 0], [1, 5, 1, 1, 5, 6], [2, 2, 2, 2, 2, 2]])
    equal = torch.randn(2, 2, requires_grad=True)
    written = []
    for row in units.tolist():
        for head in range(2):
            written += [
                equal[0, head] * (t == j > 1) + equal[1, head] * (i > 0 and row[i - 1] == t > 1)
                for t in row
                for i, j in enumerate(row)
            ]
    whole = torch.stack([torch.as_tensor(x, dtype=torch.float32) for x in written]).view(3, 2, 6, 6) + bias
    query, key, value = torch.randn(3, 3, 2, 6, 4).unbind()
    graphs = Graphs(query, key, bias, num_heads=1, units=units, equal=equal)
    plain = Graphs(query, key, whole, num_heads=1)
    lengths = torch.tensor([5, 6, 6])
    results = (
        lambda g: g.materialise(),
        lambda g: g.attend(value),
        lambda g: g.layer(1).materialise(),
        lambda g: dead_row_rescue(g, lengths, 2.0, 3, torch.Generator().manual_seed(0)),
        lambda g: graph_l1(g, lengths, 3, torch.Generator().manual_seed(0)),
        lambda g: g.to(torch.float64).materialise(),
    )
    for result in results:
        found, expected = result(graphs), result(plain)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad((x**2).sum(), equal, retain_graph=True)[0] for x in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        assert gradients[0].abs().min() > 0 or found.dim() != 4 or found.shape[1] == 1
    half = Graphs(query.double(), key.double(), 0.0, units=units, equal=equal.detach().double())
    assert half.to(torch.float32).whole_bias().dtype == torch.float32


def test_l1_of_sampled_targets_estimates_the_whole_and_pulls_down_only_what_counts():
    torch.manual_seed(0)
    query = torch.randn(2, 2, 7, 3, requires_grad=True)
    graphs, lengths = Graphs(query, torch.randn(2, 2, 7, 3), torch.randn(2, 7, 7)), torch.tensor([7, 4])
    whole = graph_l1(graphs, lengths, 99)
    (gradient,) = torch.autograd.grad(whole, query)
    assert torch.all(gradient[1, :, 4:] == 0)  # padding
    low = Graphs(query, graphs.key, -50.0)
    assert graph_l1(low, lengths, 99) == 0
    assert torch.all(torch.autograd.grad(graph_l1(low, lengths, 99), query)[0] == 0)
    graphs, lengths = Graphs(query.detach()[:1], graphs.key[:1], graphs.bias), torch.tensor([7])
    generator = torch.Generator().manual_seed(0)
    parts = torch.stack([graph_l1(graphs, lengths, 2, generator) for _ in range(400)])
    assert parts.std() > 0
    assert parts.mean().item() == pytest.approx(graph_l1(graphs, lengths, 99).item(), rel=0.1)


TERMS = {"rescue": lambda *a: dead_row_rescue(*a, 0.5, 4), "l1": lambda *a: graph_l1(*a, 4)}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("size", [0, 1])
def test_terms_without_any_source_are_zero(term, size):
    empty = torch.randn(2, 1, size, 3)
    assert TERMS[term](Graphs(empty, empty, 0.0), torch.tensor([size, 0])) == 0


@pytest.mark.parametrize("term", TERMS)
def test_terms_where_every_source_is_masked_have_no_nan(term):
    query = torch.randn(1, 1, 3, 2, requires_grad=True)
    mask = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    loss = TERMS[term](Graphs(query, query.detach(), 0.0, mask), torch.tensor([3]))
    loss.backward()
    assert loss == 0
    assert torch.all(query.grad == 0)
