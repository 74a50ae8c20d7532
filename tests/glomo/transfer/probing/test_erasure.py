"""Erasure against scores written out, one part at a time."""

import math

import pytest
import torch
from torch import nn

from glomo.transfer.probing import erase_features, erase_words, erased


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, generator=generator).to(dtype), torch.tensor([0, 2, 1, 1, 0])


def right_label(model, labels):
    return lambda x: model(x).log_softmax(-1).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("fill", [0.0, 0.7, torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)])
def test_dimensions_one_by_one(fill):
    model, (x, y) = network(), data()
    found = erase_features(right_label(model, y), x, fill=fill)
    for e in range(5):
        whole = model(x[e]).log_softmax(0)[y[e]].item()
        assert float(found.score[e]) == pytest.approx(whole)
        for d in range(4):
            without = x[e].clone()
            without[d] = fill if isinstance(fill, float) else fill[d]
            left = model(without).log_softmax(0)[y[e]].item()
            assert float(found.change[e, d]) == pytest.approx(whole - left)
            assert float(found.relative[e, d]) == pytest.approx((whole - left) / abs(whole))
    assert not found.change.requires_grad


def test_the_sign_says_what_helps():
    """Whether scores are probabilities or their logarithms: erasing what helps is above zero, what hurts below."""
    x = torch.tensor([[2.0, -1.0, 0.0]])
    for score in (lambda v: torch.sigmoid(v.sum(-1)), lambda v: torch.sigmoid(v.sum(-1)).log()):
        found = erase_features(score, x)
        assert found.change[0].sign().tolist() == [1, -1, 0]
        assert found.relative[0].sign().tolist() == [1, -1, 0]
    p, q = (1 / (1 + math.exp(-z)) for z in (1.0, -1.0))
    relative = erase_features(lambda v: torch.sigmoid(v.sum(-1)), x).relative
    assert float(relative[0, 0]) == pytest.approx((p - q) / p)


def test_a_certain_label_gives_no_nan():
    found = erase_features(lambda v: torch.zeros(len(v)), torch.ones(2, 3))
    assert found.relative.tolist() == [[0.0] * 3] * 2


def test_groups_and_places_between():
    x = torch.arange(24.0).view(2, 3, 4)
    found = erase_features(lambda v: v.flatten(1).sum(1), x, groups=[[0, 2], [3], [0, 1, 2, 3]])
    expected = [[float(x[e][:, group].sum()) for group in ([0, 2], [3], [0, 1, 2, 3])] for e in range(2)]
    assert found.change.tolist() == expected
    assert torch.equal(x, torch.arange(24.0).view(2, 3, 4))  # the features are not written to
    assert erase_features(lambda v: v.flatten(1).sum(1), x, groups=[]).change.shape == (2, 0)


def test_half_precision():
    model, (x, y) = network(torch.bfloat16), data(torch.bfloat16)
    assert erase_features(right_label(model, y), x).change.dtype == torch.float32


def test_words():
    worth = {"not": 3.0, "good": 2.0, "film": 0.0, "<unk>": -1.0}
    found = erase_words(lambda words: sum(worth[w] for w in words), ["not", "good", "film"])
    assert found.score.tolist() == [5.0]
    assert found.change.tolist() == [[3.0, 2.0, 0.0]]
    assert found.relative.tolist() == [[0.6, 0.4, 0.0]]
    found = erase_words(lambda words: sum(worth[w] for w in words), ["not", "good", "film"], "<unk>")
    assert found.change.tolist() == [[4.0, 3.0, 1.0]]
    texts = []
    erase_words(lambda units: texts.append(units) or 0.0, [5, 0, 5], 0)  # id 0 is a replacement too
    assert texts == [[5, 0, 5], [0, 0, 5], [5, 0, 5], [5, 0, 0]]


def test_neurons_of_a_hidden_layer():
    model, (x, _) = network(), data()
    whole = model(x)
    hidden = model[1](model[0](x)).clone()
    hidden[:, [1, 4]] = 0
    with erased(model[1], [1, 4]):
        torch.testing.assert_close(model(x), model[2](hidden))
    torch.testing.assert_close(model(x), whole)
    mean = torch.linspace(-1, 1, 6, dtype=torch.float64)
    hidden[:, [1, 4]] = mean[[1, 4]]
    with erased(model[1], [1, 4], mean):
        torch.testing.assert_close(model(x), model[2](hidden))
    with pytest.raises(RuntimeError), erased(model[1], [1, 4]):
        model(x[:, :2])
    torch.testing.assert_close(model(x), whole)


def test_outputs_that_are_tuples():
    rnn = nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    out, (h, _) = rnn(x)
    with erased(rnn, [0]):
        changed, (same, _) = rnn(x)
    assert (changed[..., 0] == 0).all()
    assert torch.equal(changed[..., 1:], out[..., 1:])
    assert torch.equal(same, h)


def test_mistakes():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"a group of dimensions is \[0, 3\]; at least one, from 0 to 2"):
        erase_features(lambda v: v.sum(1), x, [[0, 3]])
    with pytest.raises(ValueError, match=r"dimensions is \[\]"):
        erase_features(lambda v: v.sum(1), x, [[]])
    with pytest.raises(ValueError, match=r"the score is \(\); \(2,\), one a row"):
        erase_features(lambda v: v.sum(), x)
    with pytest.raises(ValueError, match=r"fill is \(2,\); a number, or \(3,\)"):
        erase_features(lambda v: v.sum(1), x, fill=torch.zeros(2))
    with pytest.raises(ValueError, match=r"the features are \(3,\)"):
        erase_features(lambda v: v.sum(), x[0])
    with pytest.raises(ValueError, match="the text has 1 units"):
        erase_words(lambda units: 0.0, [3])
    linear = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"dimensions is \[2\]; at least one, from 0 to 1"), erased(linear, [2]):
        linear(x)
