"""The classifier: padding changes nothing, and each head pools what it says."""

import pytest
import torch

from glomo.data import Vocabulary, pad
from glomo.nn import GLoMoConfig, NoGraph, UniformGraph, random_graph
from glomo.training.classifier import BiGRU, TextClassifier


def graph():
    vocabulary = Vocabulary.build(["a b c d e f g"], 100)
    return random_graph(GLoMoConfig(vocab_size=9, dim=8, layers=2, heads=2, head_dim=4), vocabulary, 0)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("head", ["pooling", "bigru"])
def test_a_batch_of_different_lengths_equals_each_text_alone(states, head):
    torch.manual_seed(0)
    source = graph()
    model = TextClassifier(torch.randn(9, 6), True, source, 3, states, head, 8).eval()
    texts = [[2, 3, 4, 5, 6, 7], [3], [8, 8, 2]]
    units, lengths = pad(texts)
    together = model(units, lengths, source.queries_keys(units, lengths))
    for text, row in zip(texts, together, strict=True):
        one, length = pad([text])
        torch.testing.assert_close(model(one, length, source.queries_keys(one, length))[0], row, rtol=1e-5, atol=1e-6)


def test_pooling_without_a_graph_is_the_maximum_of_a_relu_layer():
    torch.manual_seed(0)
    table = torch.randn(9, 6)
    model = TextClassifier(table, False, NoGraph(), 3, hidden=5).eval()
    units, lengths = pad([[2, 5, 4], [7]])
    hidden = torch.stack([torch.stack([model.head(table[u]) for u in text]).amax(0) for text in ([2, 5, 4], [7])])
    torch.testing.assert_close(model(units, lengths, ()), model.out(hidden))


def test_bigru_reads_both_ways_over_the_true_length():
    torch.manual_seed(0)
    gru = BiGRU(3, 5)
    x, lengths = torch.randn(1, 6, 3), torch.tensor([4])
    out = gru(x, lengths)
    forward, backward = gru.grus
    torch.testing.assert_close(out[:, :4, :3], forward(x[:, :4])[0])
    torch.testing.assert_close(out[:, :4, 3:], backward(x[:, :4].flip(1))[0].flip(1))


def test_what_learns():
    fixed = TextClassifier(torch.randn(9, 6), False, UniformGraph(), 3)
    learning = TextClassifier(torch.randn(9, 6), True, UniformGraph(), 3)
    assert not fixed.embedding.weight.requires_grad
    assert learning.embedding.weight.requires_grad
    assert not any("graph_predictor" in name for name in fixed.state_dict())
