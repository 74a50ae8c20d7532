import pytest
import torch

from glomo.nn import FeaturePredictor, Graphs


def hand_graphs(config, size):
    """Graphs whose scores are their bias, so that they are known without queries and keys."""
    nothing = torch.zeros(1, config.layers * config.heads, size, 1, dtype=torch.float64)
    return Graphs(
        nothing, nothing, torch.rand(config.layers * config.heads, size, size).double(), num_heads=config.heads
    )


@pytest.mark.parametrize("update", ["gru", "gru_product", "linear"])
def test_recursion_against_loops(oracle, update):
    config = oracle.small("paper", update=update).config
    f = FeaturePredictor(config).double()
    graphs = hand_graphs(config, 5)
    x = torch.randn(1, 5, config.dim, dtype=torch.float64)
    weights, width = graphs.materialise()[0], config.dim // config.heads
    state = x[0]
    for layer in range(config.layers):
        rows = []
        for t in range(5):
            slices = []
            for head in range(config.heads):
                a = weights[layer * config.heads + head]
                part = slice(head * width, (head + 1) * width)
                slices.append(sum((a[t, j] * state[j, part] for j in range(5)), torch.zeros(width).double()))
            aggregate = torch.cat(slices)
            if update == "linear":
                rows.append(state[t] + f.linears[layer].weight @ aggregate + f.linears[layer].bias)
                continue
            given = aggregate if update == "gru" else torch.cat([aggregate * state[t], aggregate])
            cell = (f.cell.weight_ih, f.cell.weight_hh, f.cell.bias_ih, f.cell.bias_hh)
            rows.append(oracle.gru_cell(*cell, given, state[t]))
        state = torch.stack(rows)
    torch.testing.assert_close(f(x, graphs)[0], state, rtol=1e-10, atol=1e-12)


def test_one_gru_cell_serves_all_layers_and_linear_maps_are_per_layer(oracle):
    def count(layers, update):
        return sum(
            p.numel() for p in FeaturePredictor(oracle.small("paper", layers=layers, update=update).config).parameters()
        )

    assert count(1, "gru") == count(3, "gru")
    assert count(3, "linear") == 3 * count(1, "linear")


def test_normalised_aggregate_does_not_feel_the_size_of_the_features(oracle):
    config = oracle.small("paper", norm_aggregate=True, update="linear", layers=1).config
    f = FeaturePredictor(config).double()
    graphs = hand_graphs(config, 4)
    x = torch.randn(1, 4, config.dim, dtype=torch.float64)
    torch.testing.assert_close(
        (f(100 * x, graphs) - 100 * x)[0, 1:], (f(10 * x, graphs) - 10 * x)[0, 1:], rtol=1e-2, atol=1e-2
    )


def test_gradcheck(oracle):
    config = oracle.small("released", dim=4, heads=2).config
    f = FeaturePredictor(config).double()
    graphs = hand_graphs(config, 3)
    assert torch.autograd.gradcheck(
        lambda x: f(x, graphs), torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    )
