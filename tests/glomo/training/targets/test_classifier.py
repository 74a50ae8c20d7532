"""The classifiers: padding changes nothing, and each head pools what it says."""

import pytest
import torch

from glomo.data import Vocabulary, pad
from glomo.nn import GLoMoConfig, NoGraph, UniformGraph, random_graph
from glomo.training.targets.classifier import ConvHead, PairClassifier, TextClassifier
from glomo.training.targets.words import WordFeatures, WordTable


def features(table, learn=True):
    return WordFeatures(WordTable({}, table), learn)


def graph():
    vocabulary = Vocabulary.build(["a b c d e f g"], 100)
    return random_graph(GLoMoConfig(vocab_size=9, dim=8, layers=2, heads=2, head_dim=4), vocabulary, 0)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("head", ["pooling", "bigru"])
def test_a_batch_of_different_lengths_equals_each_text_alone(states, head):
    torch.manual_seed(0)
    source = graph()
    model = TextClassifier(features(torch.randn(9, 6)), source, 3, states, head, 8).eval()
    texts = [[2, 3, 4, 5, 6, 7], [3], [8, 8, 2]]
    units, lengths = pad(texts)
    together = model(units, lengths, source.queries_keys(units, lengths))
    for text, row in zip(texts, together, strict=True):
        one, length = pad([text])
        torch.testing.assert_close(model(one, length, source.queries_keys(one, length))[0], row, rtol=1e-5, atol=1e-6)


def test_pooling_without_a_graph_is_the_maximum_of_a_relu_layer():
    torch.manual_seed(0)
    table = torch.randn(9, 6)
    model = TextClassifier(features(table, False), NoGraph(), 3, hidden=5).eval()
    units, lengths = pad([[2, 5, 4], [7]])
    hidden = torch.stack([torch.stack([model.head(table[u]) for u in text]).amax(0) for text in ([2, 5, 4], [7])])
    torch.testing.assert_close(model(units, lengths, ()), model.out(hidden))


def test_pairs_are_compared_as_the_formula_says():
    torch.manual_seed(0)
    table = torch.randn(9, 6)
    model = PairClassifier(features(table), NoGraph(), 3, hidden=5).eval()
    first, second = [[2, 5, 4], [7]], [[3], [8, 2]]
    found = model(pad(first), pad(second), [(), ()])
    for i in range(2):
        u, v = (model.head(table[units]).amax(0) for units in (first[i], second[i]))
        torch.testing.assert_close(found[i], model.out(torch.cat([u, v, (u - v).abs(), u * v])))


def test_the_convolutional_head_sees_the_image_as_it_lies():
    torch.manual_seed(0)
    head, image = ConvHead(3, 4), torch.randn(2, 3, 6, 6)
    rows = image.flatten(2).mT  # a unit a pixel, row after row
    right = torch.nn.functional.max_pool2d(head.first(image).relu(), 2)
    torch.testing.assert_close(head(rows), head.second(right).relu().flatten(2).mT)


def test_what_learns():
    fixed = TextClassifier(features(torch.randn(9, 6), False), UniformGraph(), 3)
    learning = TextClassifier(features(torch.randn(9, 6)), UniformGraph(), 3)
    assert not fixed.features.embedding.weight.requires_grad
    assert learning.features.embedding.weight.requires_grad
    assert not any("graph_predictor" in name for name in fixed.state_dict())
