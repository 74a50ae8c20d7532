"""The Fisher information against closed forms in numpy."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.transfer.closeness import diagonal_fisher


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def regression(inputs=4, classes=3, count=11):
    model = nn.Linear(inputs, classes).double()
    x = torch.randn(count, inputs, dtype=torch.float64)
    p = softmax(x.numpy() @ model.weight.detach().numpy().T + model.bias.detach().numpy())
    return model, x, p


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def test_logistic_regression_exactly():
    """F of weight (k, j) is mean_n p_k (1 - p_k) x_j^2, of bias k mean_n p_k (1 - p_k)."""
    model, x, p = regression()
    found = diagonal_fisher(model, [x[:5], x[5:]], labels="all")
    weight, bias = np.zeros((3, 4)), np.zeros(3)
    for n in range(11):
        for k in range(3):
            spread = p[n, k] * (1 - p[n, k])
            bias[k] += spread / 11
            for j in range(4):
                weight[k, j] += spread * x[n, j].item() ** 2 / 11
    np.testing.assert_allclose(found["weight"].numpy(), weight, rtol=1e-12)
    np.testing.assert_allclose(found["bias"].numpy(), bias, rtol=1e-12)


def test_true_labels():
    """mean_n (1[y = k] - p_k)^2 x_j^2."""
    model, x, p = regression()
    y = torch.randint(3, (11,))
    found = diagonal_fisher(model, [(x[:2], y[:2]), (x[2:], y[2:])], labels="empirical")
    residual = np.eye(3)[y.numpy()] - p
    expected = np.mean([np.outer(residual[n] ** 2, x[n].numpy() ** 2) for n in range(11)], 0)
    np.testing.assert_allclose(found["weight"].numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(found["bias"].numpy(), (residual**2).mean(0), rtol=1e-12)


def test_drawn_labels():
    """Drawn by the distribution function, from the generator alone, one number for an example; on average exact."""
    model, x, p = regression()
    uniform = torch.rand(11, dtype=torch.float64, generator=generator()).numpy()
    y = np.array([next(k for k in range(3) if p[n, : k + 1].sum() > uniform[n]) for n in range(11)])
    assert len(set(y)) > 1
    residual = np.eye(3)[y] - p
    found = diagonal_fisher(model, [x], generator=generator())
    np.testing.assert_allclose(found["bias"].numpy(), (residual**2).mean(0), rtol=1e-12)
    state = torch.get_rng_state()
    assert torch.equal(diagonal_fisher(model, [x])["bias"], diagonal_fisher(model, [x])["bias"])
    assert torch.equal(torch.get_rng_state(), state)
    many = diagonal_fisher(model, [x.repeat(500, 1)], generator=generator())
    torch.testing.assert_close(many["weight"], diagonal_fisher(model, [x], labels="all")["weight"], rtol=0.05, atol=0)


def test_what_has_no_probability_is_never_drawn(monkeypatch):
    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64))

        def forward(self, x):
            hidden = x.new_full((len(x), 1), -torch.inf)
            return torch.cat([hidden, self.weight.expand(len(x), 2), hidden], 1)

    x = torch.zeros(300, 1, dtype=torch.float64)
    low, high = (float(p) for p in softmax(np.array([0.0, 1.0])))
    exact = torch.full((2,), low * high, dtype=torch.float64)
    torch.testing.assert_close(diagonal_fisher(Sure(), [x], labels="all")["weight"], exact)
    torch.testing.assert_close(diagonal_fisher(Sure(), [x])["weight"], exact, rtol=0.1, atol=0)
    for uniform, other in ((0.0, high), (1 - 2**-53, low)):  # the ends of what can be drawn
        monkeypatch.setattr(torch, "rand", lambda n, uniform=uniform, **_: torch.full((n,), uniform).double())
        found = diagonal_fisher(Sure(), [x])["weight"]
        torch.testing.assert_close(found, torch.full_like(exact, other**2))


def test_evaluation_mode(make_net, units):
    """Others leave dropout on."""
    net = make_net().train()
    one, other = (diagonal_fisher(net, [units], labels="all") for _ in range(2))
    for name, fisher in diagonal_fisher(copy.deepcopy(net).eval(), [units], labels="all").items():
        assert torch.equal(one[name], fisher)
        assert torch.equal(other[name], fisher)


def test_modes_come_back_after_an_error(make_net):
    net = make_net()
    with pytest.raises(IndexError):
        diagonal_fisher(net, [torch.full((2, 3), 99)])
    assert net.dropout.training
    assert net.unused.requires_grad


def test_frozen_unused_and_tied_parameters(make_net, units):
    net = make_net()
    free = diagonal_fisher(net, [units], labels="all")
    assert set(free) == set(dict(net.named_parameters()))
    assert "head.weight" not in free  # it is the embedding
    assert (free["unused"] == 0).all()
    net.requires_grad_(False)
    torch.testing.assert_close(diagonal_fisher(net, [units], labels="all"), free)
    # a tied weight has the square of the summed gradient, not the sum of two squares
    x, weight = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    tied[1].weight = tied[0].weight
    with torch.no_grad():
        tied[0].weight.copy_(weight)
    (found,) = diagonal_fisher(tied, [(x, torch.zeros(3).long())], labels="empirical").values()
    expected = np.zeros((2, 2))
    for row in x.numpy():
        w = weight.numpy()
        residual = np.array([1.0, 0.0]) - softmax(w @ (w @ row))
        expected += (np.outer(residual, w @ row) + np.outer(w.T @ residual, row)) ** 2 / 3
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_every_example_counts_once():
    """Others stop one too late. The Fisher information of a data set read twice is that of the data set."""
    model, x, _ = regression(count=3)
    each = [diagonal_fisher(model, [row[None]], labels="all")["weight"] for row in x]
    torch.testing.assert_close(diagonal_fisher(model, [x], labels="all")["weight"], sum(each) / 3)
    twice = diagonal_fisher(model, itertools.chain([x], [x[:0]], x.split(2)), labels="all")
    torch.testing.assert_close(twice["weight"], sum(each) / 3)
    assert twice["weight"].shape == (3, 4)


def test_a_sequence_is_one_example():
    """log p of a sequence is the sum over its units; what is ignored adds nothing."""
    model = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 6)).double()
    units = torch.tensor([[1, 2, 3, 4], [5, 1, 0, 0], [2, 0, 0, 0]])
    following = torch.tensor([[2, 3, 4, 1], [1, 3, 0, 0], [0, 0, 0, 0]])
    found = diagonal_fisher(
        model, [(units[:1], following[:1]), (units[1:], following[1:])], "empirical", ignore_index=0
    )
    expected = np.zeros(6)
    for row, labels in zip(units, following, strict=True):
        p = softmax(model(row).detach().numpy())
        gradient = sum((np.eye(6)[y] - p[t] for t, y in enumerate(labels.tolist()) if y), np.zeros(6))
        expected += gradient**2 / 3
    np.testing.assert_allclose(found["1.bias"].numpy(), expected, rtol=1e-10)


def test_drawn_sequences_do_not_depend_on_padding():
    model = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 6))
    units = torch.randint(1, 6, (7, 9), generator=generator())
    units[torch.arange(9) >= torch.tensor([9, 4, 1, 0, 2, 9, 3])[:, None]] = 0
    whole = diagonal_fisher(model, [(units, units)], generator=generator(), ignore_index=0)
    rows = [(row[None, : max(int((row > 0).sum()), 1)],) * 2 for row in units]
    torch.testing.assert_close(diagonal_fisher(model, rows, generator=generator(), ignore_index=0), whole)
    assert not torch.equal(
        diagonal_fisher(model, rows, generator=generator(9), ignore_index=0)["1.bias"], whole["1.bias"]
    )


def test_a_language_model():
    model = LSTMLanguageModel(AWDLSTMConfig.preset("tiny", vocab_size=12))
    texts = torch.randint(1, 12, (5, 8), generator=generator())
    texts[1, 4:] = 0
    fisher = diagonal_fisher(
        model,
        [(texts[:2, :-1], texts[:2, 1:]), (texts[2:, :-1], texts[2:, 1:])],
        labels="empirical",
        logits=lambda model, units: model.logits(model.encoder(units).raw),
        ignore_index=0,
    )
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for text in texts:
        model.zero_grad()
        nats = model(text[None, :-1], text[None, 1:])[1]
        (nats * (text[1:] != 0).sum()).backward()  # nats are a mean over the units
        for name, p in model.named_parameters():
            expected[name] += p.grad**2 / 5
    torch.testing.assert_close(fisher, expected, rtol=1e-4, atol=1e-6)


def test_inputs_by_name_and_several():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x, y):
            return self.layer(x - y)

    model, x, y = Sum(), *torch.randn(2, 5, 4, dtype=torch.float64)
    expected = diagonal_fisher(model.layer, [x - y], labels="all")
    for batch in ({"x": x, "y": y}, ((x, y), None), ({"y": y, "x": x}, torch.zeros(5).long())):
        found = diagonal_fisher(model, [batch], labels="all")
        assert {name.removeprefix("layer."): f for name, f in found.items()}.keys() == expected.keys()
        torch.testing.assert_close(found["layer.weight"], expected["weight"])


def test_types_of_numbers():
    model, x, _ = regression()
    exact = diagonal_fisher(model, [x], labels="all")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        found = diagonal_fisher(copy.deepcopy(model).to(dtype), [x.to(dtype)], labels="all")
        assert found["weight"].dtype == torch.float32
        torch.testing.assert_close(found["weight"].double(), exact["weight"], rtol=tolerance, atol=tolerance / 50)


def test_mistakes():
    model, x, _ = regression()
    y = torch.zeros(11).long()
    with pytest.raises(ValueError, match="batches hold no example; the Fisher information is a mean"):
        diagonal_fisher(model, [])
    with pytest.raises(ValueError, match="batches hold no example"):
        diagonal_fisher(model, [x[:0]])
    with pytest.raises(ValueError, match="labels is 'true'; 'sample', 'all' or 'empirical'"):
        diagonal_fisher(model, [x], labels="true")
    with pytest.raises(ValueError, match="labels is 'empirical' and a batch has none"):
        diagonal_fisher(model, [x], labels="empirical")
    with pytest.raises(ValueError, match=r"a batch's labels are \(10,\) and the logits \(11, 3\)"):
        diagonal_fisher(model, [(x, y[:10])])
    with pytest.raises(ValueError, match=r"labels are from 0 to 3; the model has the classes 0 to 2"):
        diagonal_fisher(model, [(x, y + torch.arange(11) % 4)], labels="empirical")
    with pytest.raises(ValueError, match=r"labels is 'all' and the logits are \(11, 1, 3\)"):
        diagonal_fisher(model, [x[:, None]], labels="all")
    with pytest.raises(ValueError, match=r"a batch's labels are \(\) and the logits \(11,\)"):
        diagonal_fisher(model, [x], logits=lambda model, x: model(x).sum(1))
    with pytest.raises(TypeError, match="the model returns a tuple"):
        diagonal_fisher(nn.LSTM(4, 2).double(), [x])
    with pytest.raises(TypeError, match="a batch is a list of 1"):
        diagonal_fisher(model, [[x]])
