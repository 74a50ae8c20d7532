"""The reader against its formulas, written out for one example at a time."""

import pytest
import torch

from glomo.nn import NoGraph, UniformGraph
from glomo.training.targets.reader import SpanReader, best_spans, span_loss
from glomo.training.targets.words import WordFeatures, word_table
from glomo.training.transfer_config import Features


def reader(states=False, graph=None):
    torch.manual_seed(0)
    table = word_table(Features("random", 6, chars=4), [["a", "bb", "ccc", "dd", "e", "ff"]], [], 0)
    features = WordFeatures(table, False, 4)
    return SpanReader(features, graph or NoGraph(), hidden=3, states=states).double().eval()


def by_hand(model, paragraph, question):
    """Scores of the first and last unit, T each, from loops over the formulas of `SpanReader`."""

    def birnn(module, x):
        forward, backward = module.rnns
        return torch.cat([forward(x[None])[0][0], backward(x.flip(0)[None])[0][0].flip(0)], -1)

    p, q = (birnn(model.encoder, model.features(torch.tensor([units]))[0]) for units in (paragraph, question))
    scores = torch.empty(len(paragraph), len(question), dtype=p.dtype)
    for t in range(len(paragraph)):
        for j in range(len(question)):
            bilinear = (model.of_both * p[t] * q[j]).sum()
            scores[t, j] = model.of_paragraph(p[t])[0] + model.of_question(q[j])[0] + bilinear
    u = torch.stack([(row.softmax(0)[:, None] * q).sum(0) for row in scores])
    h = (scores.max(1).values.softmax(0)[:, None] * p).sum(0).expand_as(p)
    both = model.narrow(torch.cat([p, u, p * u, p * h], 1)).relu()
    modelled = birnn(model.modelling, both)
    ended = birnn(model.ending, modelled)
    return tuple(layer(torch.cat([x, p, u], 1))[:, 0] for layer, x in ((model.start, modelled), (model.end, ended)))


def test_the_formulas_and_that_padding_changes_nothing():
    model = reader()
    paragraphs, questions = [[2, 3, 4, 5], [6, 7]], [[3, 2], [5, 5, 4]]
    lengths = torch.tensor([4, 2]), torch.tensor([2, 3])
    p = torch.tensor([[2, 3, 4, 5], [6, 7, 0, 0]]), lengths[0]
    q = torch.tensor([[3, 2, 0], [5, 5, 4]]), lengths[1]
    start, end = model(p, q, [(), ()])
    for i, (paragraph, question) in enumerate(zip(paragraphs, questions, strict=True)):
        right = by_hand(model, paragraph, question)
        for found, wanted in zip((start[i], end[i]), right, strict=True):
            torch.testing.assert_close(found[: len(paragraph)], wanted)
            assert (found[len(paragraph) :] == float("-inf")).all()


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_it_learns_where_an_answer_stands_with_a_graph(states, joined):
    torch.manual_seed(0)
    graph = UniformGraph()
    table = word_table(Features("random", 6, chars=4), [["a", "bb", "ccc", "dd", "e", "ff"]], [], 0)
    model = SpanReader(WordFeatures(table, False, 4), graph, joined, states, hidden=8, dropout=0.0)
    groups = model.layer_patterns()
    assert list(groups)[:3] == (["embedding", "encoder", "graph"] if states else ["embedding", "graph", "encoder"])
    p = torch.tensor([[2, 3, 4, 5, 6], [5, 4, 3, 2, 6], [3, 5, 2, 4, 7]]), torch.tensor([5, 5, 5])
    q = torch.tensor([[2, 7], [3, 7], [4, 7]]), torch.tensor([2, 2])[[0, 0, 0]]
    spans = torch.tensor([[0, 1], [2, 3], [3, 4]])  # the word of the question, and the one behind it
    rows = (torch.cat([p[0], q[0]], 1), p[1] + q[1])
    inputs = [graph.queries_keys(*part) for part in ((rows,) if joined else (p, q))]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        loss = span_loss(*model(p, q, inputs), spans)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert best_spans(*model(p, q, inputs), 15).tolist() == spans.tolist()


def test_the_best_span_is_found_among_those_that_may_be():
    torch.manual_seed(0)
    start, end = torch.randn(20, 9), torch.randn(20, 9)
    start[:, 7:], end[:, 7:] = float("-inf"), float("-inf")
    for longest in (1, 3, 15):
        found = best_spans(start, end, longest)
        for i in range(20):
            allowed = [(s, e) for s in range(7) for e in range(s, min(s + longest, 7))]
            assert tuple(found[i].tolist()) == max(allowed, key=lambda span: start[i, span[0]] + end[i, span[1]])
