"""Ensembles, soups and exponential averages against their formulas written out."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from glomo.transfer.signal import Ensemble, ExponentialAverage, uniform_soup


class Constant(nn.Module):
    """The given logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits))

    def forward(self, x):
        return self.logits + 0 * x


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("causal", torch.full((2, 2), -math.inf).triu(1))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.norm(self.linear(x)))


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Net(dtype)


def train(model, steps, seed=0, lr=0.1):
    """Yields after every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 3, generator=generator).to(model.linear.weight.dtype)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        assert torch.isfinite(model.head.weight).all()
        yield


def floats(model):
    """fp64 copies of all that is averaged."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach().double().numpy().copy() for n, t in named if t.is_floating_point() and "causal" not in n}


# ensembles


def test_an_ensemble_is_the_mean_of_probabilities():
    logits = torch.randn(3, 5, 4, dtype=torch.float64) * 3
    found = Ensemble([Constant(one) for one in logits])(torch.zeros((), dtype=torch.float64))
    powers = np.exp(logits.numpy())
    mean = (powers / powers.sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(found.detach().exp().numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(found.detach().softmax(-1).numpy(), mean, rtol=1e-12)  # in place of logits


def test_an_ensemble_of_one_and_of_extremes():
    one = torch.randn(5, 4)
    torch.testing.assert_close(Ensemble([Constant(one)])(torch.zeros(())), one.log_softmax(-1))
    sure = torch.tensor([[2000.0, 0.0]])
    found = Ensemble([Constant(sure), Constant(-sure)])(torch.zeros(()))
    torch.testing.assert_close(found, torch.full((1, 2), math.log(0.5)))
    # smaller than any probability in fp32
    same = Ensemble([Constant(torch.tensor([[200.0, 0.0]]))] * 2)(torch.zeros(()))
    torch.testing.assert_close(same, torch.tensor([[0.0, -200.0]]))
    assert Ensemble([Constant(sure.bfloat16())])(torch.zeros(())).dtype == torch.float32


def test_an_ensemble_holds_its_models():
    models = [net(0).eval(), net(1).eval()]
    ensemble = Ensemble(models)
    assert len(list(ensemble.parameters())) == 2 * len(list(models[0].parameters()))
    x = torch.randn(3, 3)
    other = Ensemble([net(2), net(3)]).eval()
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other(x), ensemble(x))
    assert torch.equal(copy.deepcopy(ensemble)(x), ensemble(x))
    ensemble(x).sum().backward()
    assert models[0].head.weight.grad.any()


def test_mistakes_with_ensembles():
    with pytest.raises(ValueError, match="no model in the ensemble"):
        Ensemble([])
    with pytest.raises(ValueError, match=r"logits of the shapes \(5, 4\), \(5, 3\); one shape is needed"):
        Ensemble([Constant(torch.zeros(5, 4)), Constant(torch.zeros(5, 3))])(torch.zeros(()))


# soups


def test_a_soup_is_the_mean_of_the_weights():
    models = [net(seed) for seed in range(3)]
    for number, model in enumerate(models):
        for _ in train(model, 2 + number):
            pass
    soup = uniform_soup([model.state_dict() for model in models])
    for name in models[0].state_dict():
        values = [model.state_dict()[name] for model in models]
        if values[0].is_floating_point():
            expected = np.mean([value.double().numpy() for value in values], axis=0)
            np.testing.assert_allclose(soup[name].numpy(), expected, rtol=1e-6, atol=1e-8)
        else:
            assert soup[name] == values[-1]
            assert soup[name].dtype == values[-1].dtype
    assert soup["norm.num_batches_tracked"] == 4
    assert (soup["causal"][0, 1], soup["causal"][1, 0]) == (-math.inf, 0)
    models[0].load_state_dict(soup)


def test_a_soup_is_a_copy_and_of_equals_the_same():
    state = net().state_dict()
    soup = uniform_soup([state, state, state])
    assert all(torch.equal(soup[name], state[name]) for name in state)
    for tensor in soup.values():
        tensor.zero_()
    assert state["linear.weight"].any()
    alone = uniform_soup([state])
    assert all(torch.equal(alone[n], state[n]) and alone[n].data_ptr() != state[n].data_ptr() for n in state)


def test_a_soup_in_half_precision_sums_in_double():
    states = [{"w": torch.tensor([256.0, 1.0]).bfloat16()}, {"w": torch.tensor([1.0, 1.0]).bfloat16()}] + [
        {"w": torch.tensor([1.0, 1.0]).bfloat16()} for _ in range(126)
    ]
    soup = uniform_soup(states)["w"]
    assert soup.dtype == torch.bfloat16
    torch.testing.assert_close(soup, torch.tensor([(256 + 127) / 128, 1.0]).bfloat16(), rtol=0, atol=0)
    assert uniform_soup([{"w": torch.tensor([1 + 2j])}, {"w": torch.tensor([3 - 4j])}])["w"] == 2 - 1j


def test_statistics_of_a_soup_are_computed_anew():
    """Means of BatchNorm's statistics are not those of the soup's activations; `update_bn` makes these."""
    models = [net(seed) for seed in range(2)]
    for model in models:
        for _ in train(model, 3):
            pass
    soup = net()
    soup.load_state_dict(uniform_soup([model.state_dict() for model in models]))
    batches = [torch.randn(6, 3) for _ in range(4)]
    wrong = soup.norm.running_mean.clone()
    update_bn(batches, soup)
    weight, bias = soup.linear.weight.detach().double(), soup.linear.bias.detach().double()
    activations = [(x.double() @ weight.T + bias).numpy() for x in batches]
    mean = np.mean([a.mean(0) for a in activations], axis=0)
    np.testing.assert_allclose(soup.norm.running_mean.numpy(), mean, rtol=1e-5, atol=1e-6)
    variance = np.mean([a.var(0, ddof=1) for a in activations], axis=0)
    np.testing.assert_allclose(soup.norm.running_var.numpy(), variance, rtol=1e-5)
    assert not torch.allclose(wrong, soup.norm.running_mean, atol=1e-3)


def test_mistakes_with_soups():
    with pytest.raises(ValueError, match="there is no state"):
        uniform_soup([])
    one = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"'a' is \(2, 3\) in state 1 and \(2, 2\) in state 3"):
        uniform_soup([one, one, {**one, "a": torch.zeros(2, 2)}])
    with pytest.raises(ValueError, match=r"'b' is \(4,\) in state 1 and absent in state 2"):
        uniform_soup([one, {"a": one["a"]}])
    with pytest.raises(ValueError, match=r"'b' is absent in state 1 and \(4,\) in state 2"):
        uniform_soup([{"a": one["a"]}, one])


# exponential averages


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_an_exponential_average_is_its_formula(decay, warmup):
    """From the first update on, for parameters and for the statistics of BatchNorm."""
    model = net()
    average, expected = ExponentialAverage(model, decay, warmup), floats(model)
    for t, _ in enumerate(train(model, 12), 1):
        average.update_parameters(model)
        a = min(decay, 1 - 1 / (t + 1)) if warmup else decay
        expected = {name: a * value + (1 - a) * floats(model)[name] for name, value in expected.items()}
    for name, value in floats(average.module).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)
    assert average.n_averaged == 12


def test_warm_up_with_decay_1_is_the_plain_mean():
    model = net()
    average, seen = ExponentialAverage(model, decay=1.0, warmup=True), [floats(model)]
    for _ in train(model, 9):
        average.update_parameters(model)
        seen.append(floats(model))
    for name, value in floats(average.module).items():
        np.testing.assert_allclose(value, np.mean([one[name] for one in seen], axis=0), rtol=2e-5, atol=2e-6)


def test_buffers_are_not_forgotten():
    """Statistics are averaged, counts copied, masks of -inf stay; those too that no checkpoint has."""
    model = net()
    average = ExponentialAverage(model, 0.5)
    for _ in train(model, 3):
        pass
    mean = model.norm.running_mean.clone()
    model.scratch.fill_(3.0)
    average.update_parameters(model)
    torch.testing.assert_close(average.module.norm.running_mean, mean / 2)  # it was 0
    assert average.module.norm.num_batches_tracked == 3
    assert torch.equal(average.module.causal, model.causal)
    assert average.module.scratch.tolist() == [2.0, 2.0]
    for decay in (0.0, 1.0):
        other = ExponentialAverage(model, decay)
        other.update_parameters(model)
        assert torch.equal(other.module.causal, model.causal)


def test_what_does_not_change_does_not_drift():
    model = net()
    average = ExponentialAverage(model, 0.7)
    for _ in range(50):
        average.update_parameters(model)
    assert all(torch.equal(a, b) for a, b in zip(average.module.parameters(), model.parameters(), strict=True))


def test_a_cast_leaves_the_means_in_single():
    model = net(dtype=torch.bfloat16)
    average = ExponentialAverage(model, 0.999)
    for _ in range(3):
        average.update_parameters(model)
        average.to(torch.float16)
        average.bfloat16()
    kept = average.means.get_buffer("linear/weight")
    assert kept.dtype == torch.float32
    with torch.no_grad():
        model.linear.weight += 1
    expected = kept + 0.001 * (model.linear.weight.float() - kept)
    average.update_parameters(model)
    torch.testing.assert_close(average.means.get_buffer("linear/weight"), expected)


def test_half_precision_is_averaged_in_single():
    """One step of 0.001 is nothing in bf16; a thousand must be something."""
    model = net(dtype=torch.bfloat16)
    average = ExponentialAverage(model, 0.999)
    start = model.linear.weight.detach().double()
    with torch.no_grad():
        model.linear.weight.add_(1.0)
    target = model.linear.weight.detach().double()
    for _ in range(1000):
        average.update_parameters(model)
    expected = target + (start - target) * 0.999**1000
    assert average.module.linear.weight.dtype == torch.bfloat16
    torch.testing.assert_close(average.module.linear.weight.double(), expected, rtol=0.01, atol=0.01)
    assert average.state_dict()["means.linear/weight"].dtype == torch.float32
    torch.testing.assert_close(average.module.linear.weight, average.means.get_buffer("linear/weight").bfloat16())


def test_double_precision():
    model = net(dtype=torch.float64)
    average, expected = ExponentialAverage(model, 0.9), floats(model)
    for _ in train(model, 5):
        average.update_parameters(model)
        expected = {name: 0.9 * value + 0.1 * floats(model)[name] for name, value in expected.items()}
    for name, value in floats(average.module).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_that_was_killed_goes_on_identically(dtype):
    def run(model, average, seed, steps):
        for _ in train(model, steps, seed):
            average.update_parameters(model)

    whole = net(dtype=dtype)
    kept = ExponentialAverage(whole, 0.95, warmup=True)
    run(whole, kept, 1, 5)
    saved = copy.deepcopy((whole.state_dict(), kept.state_dict()))
    copied = copy.deepcopy((whole, kept))
    run(whole, kept, 2, 5)
    again = net(7, dtype)
    restored = ExponentialAverage(again, 0.95, warmup=True)
    again.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    assert restored.n_averaged == 5
    run(again, restored, 2, 5)
    run(*copied, 2, 5)
    for found in (restored, copied[1]):
        assert kept.state_dict().keys() == found.state_dict().keys()
        assert all(
            torch.equal(a, b) for a, b in zip(kept.state_dict().values(), found.state_dict().values(), strict=True)
        )


def test_the_average_is_a_copy_without_gradients_in_evaluation_mode():
    model = net().train()
    model(torch.randn(4, 3)).sum().backward()
    average = ExponentialAverage(model)
    assert model.training
    assert not average.module.training
    assert all(p.grad is None and not p.requires_grad for p in average.parameters())
    assert all(p.grad is not None and p.requires_grad for p in model.parameters())
    x = torch.randn(4, 3)
    assert not average(x).requires_grad
    with torch.no_grad():
        model.linear.weight.zero_()
    assert average.module.linear.weight.any()
    assert isinstance(average, AveragedModel)


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    average = ExponentialAverage(model, 0.5)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(2.0)
    average.update_parameters(model)
    assert average.module[0].weight is average.module[1].weight
    torch.testing.assert_close(average.module[0].weight.detach(), before + 1.0)


def test_mistakes_with_averages():
    for decay in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"decay is {decay}; a number from 0"):
            ExponentialAverage(net(), decay)
    average = ExponentialAverage(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"'0.weight' is \(2, 3\) in the average and \(2, 4\) in the given model"):
        average.update_parameters(nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"'1.weight' is absent in the average and \(2, 2\) in the given model"):
        average.update_parameters(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    assert average.n_averaged == 0


def test_stochastic_weight_averaging_of_torch_is_the_running_mean():
    """The page sends users to it."""
    model = net()
    average, seen = AveragedModel(model), []
    for _ in train(model, 6):
        average.update_parameters(model)
        seen.append(floats(model)["head.weight"])
    np.testing.assert_allclose(floats(average.module)["head.weight"], np.mean(seen, axis=0), rtol=1e-5)
