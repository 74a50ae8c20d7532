"""The graph over two texts: as one row it is the graph of the row, alone it is that of each."""

import pytest
import torch

from glomo.data import Vocabulary
from glomo.nn import BandGraph, GLoMoConfig, GraphTransfer, NoGraph, UniformGraph, random_graph
from glomo.training.targets.layers import BiRNN, PairTransfer, padding

FIRST = [[2, 3, 4, 5, 6], [7, 3], [4, 4, 4]]
SECOND = [[5, 3], [2, 2, 8, 3], [9]]


def graphs():
    vocabulary = Vocabulary.build(["a b c d e f g h"], 100)
    config = GLoMoConfig(vocab_size=len(vocabulary), dim=8, layers=2, heads=2, head_dim=4)
    return [UniformGraph(), BandGraph(2), random_graph(config, vocabulary, 0), NoGraph()]


def padded(rows):
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return tokens, lengths


@pytest.mark.parametrize("graph", graphs(), ids=["uniform", "band", "random", "none"])
@pytest.mark.parametrize("joined", [True, False])
def test_each_example_by_itself_without_padding(graph, joined):
    torch.manual_seed(0)
    table = torch.randn(12, 6)
    transfer = PairTransfer(graph, 6, joined, weights="target", fusion="concat")
    (x, x_lengths), (y, y_lengths) = padded(FIRST), padded(SECOND)
    rows = [a + b for a, b in zip(FIRST, SECOND, strict=True)]
    inputs = [graph.queries_keys(*padded(part)) for part in ((rows,) if joined else (FIRST, SECOND))]
    found = transfer((table[x], x_lengths), (table[y], y_lengths), inputs)
    alone = transfer.transfer
    assert isinstance(alone, GraphTransfer)
    for i, (first, second) in enumerate(zip(FIRST, SECOND, strict=True)):

        def apply(units):
            ids, lengths = padded([units])
            return alone(table[ids], lengths, graph.queries_keys(ids, lengths))[0]

        if joined:
            right = apply(first + second).split([len(first), len(second)])
        else:
            right = (apply(first), apply(second))
        torch.testing.assert_close(found[0][i, : len(first)], right[0])
        torch.testing.assert_close(found[1][i, : len(second)], right[1])


@pytest.mark.parametrize("kind", [torch.nn.GRU, torch.nn.LSTM])
def test_both_directions_are_pytorchs(kind):
    torch.manual_seed(0)
    ours, theirs = BiRNN(5, 6, kind), kind(5, 3, batch_first=True, bidirectional=True)
    for direction, rnn in zip(("", "_reverse"), ours.rnns, strict=True):
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(theirs, name + direction).data.copy_(getattr(rnn, name))
    x, lengths = torch.randn(3, 7, 5), torch.tensor([7, 1, 4])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    right, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    found = ours(x, lengths)
    behind = padding(lengths, 7)
    torch.testing.assert_close(found[~behind], right[~behind])
