"""Gradients example by example: the same however they are batched, on models that torch.func can take or cannot."""

import copy

import pytest
import torch
from torch import nn

from glomo import relu2_attention
from glomo.nn.recurrent_dropout import WeightDropLSTM
from glomo.transfer.closeness import diagonal_fisher
from glomo.transfer.closeness.per_sample import SquaredGradients


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layer = layer
        self.head = nn.Linear(5, 3)

    def forward(self, units):
        return self.head(self.layer(self.embedding(units))[0][:, -1])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, units):
        x = units.float()
        return torch.cat([self.a(row) if row.sum() > 28 else self.b(row) for row in x.split(1)])


class Kernel(nn.Module):
    """An op that only torch.autograd can differentiate."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, units):
        return self.head(Squared.apply(self.embedding(units)).mean(1))


class Graphs(nn.Module):
    """An op of this package."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, units):
        x = self.embedding(units)[:, None]
        return self.head(relu2_attention(x, x, x)[:, 0].mean(1))


class Hiding(nn.Module):
    """It keeps its weight in a list of its own, where `torch.func.functional_call` does not replace it."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Parameter(torch.randn(7, 3))
        self.layer = nn.Linear(7, 3)
        self.weights = [self.hidden]

    def forward(self, units):
        return units.float() @ self.weights[0] + self.layer(units.float())


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, units):
        return self.head(self.layer(self.embedding(units)).mean(1))


def convolution():
    return nn.Sequential(
        nn.Embedding(9, 4),
        nn.Conv1d(7, 5, 2),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(15, 3),
    )


MODELS = {
    "convolution": (convolution, True),
    "tied": (None, True),
    "attention": (Attending, True),
    "lstm": (lambda: Recurrent(nn.LSTM(4, 5, batch_first=True)), False),
    "weight drop": (lambda: Recurrent(WeightDropLSTM(4, 5, 0.5)), False),
    "gru": (lambda: Recurrent(nn.GRU(4, 5, batch_first=True)), False),
    "branches": (Branching, False),
    "kernel": (Kernel, False),
    "hiding": (Hiding, False),
    "relu2": (Graphs, False),
    "sparse": (lambda: nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(21, 3)), None),
}
every = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def made(name, make_net):
    """(model in training mode with statistics of its own, inputs, whether many gradients at once are possible)."""
    make, vectorised = MODELS[name]
    model = (make or make_net)()
    units = torch.randint(7, (67, 7), generator=generator())
    for _ in range(2):
        model(units)
    return model, units, vectorised


def single_gradients(model, units, labels):
    """{name: mean of squared gradients}, one backward pass an example."""
    model = copy.deepcopy(model).eval()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(len(units)):
        model.zero_grad()
        nn.functional.cross_entropy(model(units[n : n + 1]), labels[n : n + 1]).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] += p.grad.to_dense() ** 2
    return {name: total / len(units) for name, total in sums.items()}


@every
def test_batches_do_not_matter(made):
    """Others square the gradient of a batch's mean, which shrinks with the batch. Here: 1, 8, 64, and a last one that
    is smaller; gradients at once or one by one; drawn, all and true labels."""
    model, units, _ = made
    labels = torch.randint(3, (67,), generator=generator(1))
    expected = single_gradients(model, units, labels)
    for size in (1, 8, 64):
        found = diagonal_fisher(model, zip(units.split(size), labels.split(size), strict=True), labels="empirical")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    few = units[:9]
    for kind in ("sample", "all"):
        one, other = (diagonal_fisher(model, few.split(size), kind, generator()) for size in (1, 4))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)
    wrong = copy.deepcopy(model).eval()
    nn.functional.cross_entropy(wrong(units), labels).backward()
    batch_mean = {n: p.grad.to_dense() ** 2 for n, p in wrong.named_parameters() if p.grad is not None}
    assert sum(g.sum() for g in batch_mean.values()) < 0.5 * sum(g.sum() for g in expected.values())


@every
def test_both_ways_of_taking_gradients(made, monkeypatch):
    """At once where it can be done, and then the loop gives the same."""
    model, units, vectorised = made
    units, weights = units[:13], torch.linspace(0, 1, 13)
    model.eval()

    def value(model, inputs, labels):
        return model(inputs).log_softmax(-1).gather(1, labels[:, None])[:, 0]

    sums = SquaredGradients(model, value)
    sums.add(units, units[:, 0] % 3, weights)
    if vectorised is not None:
        assert sums.vectorised == vectorised
    monkeypatch.setattr(SquaredGradients, "_together", lambda *_: None)
    loop = SquaredGradients(model, value)
    loop.add(units, units[:, 0] % 3, weights)
    assert not loop.vectorised
    torch.testing.assert_close(sums.sums, loop.sums, rtol=1e-4, atol=1e-7)
    monkeypatch.undo()
    monkeypatch.setattr("glomo.transfer.closeness.per_sample._NUMBERS", 1)
    parts = SquaredGradients(model, value)
    parts.add(units, units[:, 0] % 3, weights)
    torch.testing.assert_close(sums.sums, parts.sums, rtol=1e-4, atol=1e-7)


@every
def test_nothing_of_the_model_changes(made):
    model, units, _ = made
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    for parameter in parameters[1:]:
        parameter.grad = torch.full_like(parameter, 3.0)
    next(iter(model.children())).eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    expected = diagonal_fisher(model, [units[:3]])
    with torch.no_grad():
        torch.testing.assert_close(diagonal_fisher(model, [units[:3]]), expected)
    assert [m.training for m in model.modules()] == modes
    assert not parameters[0].requires_grad
    assert all(p.requires_grad and (p.grad == 3).all() for p in parameters[1:])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    copy.deepcopy(model)(units)  # nothing of torch.func is left behind
