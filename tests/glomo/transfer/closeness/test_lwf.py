"""Learning without Forgetting against the paper's formula, with powers of probabilities."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from glomo.transfer.closeness import LwF, OnlineLwF, lwf_loss


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def modified_cross_entropy(logits, old, temperature):
    """Li & Hoiem: y'_k = y_k^(1/T) / sum_j y_j^(1/T), -sum_k y'_k log yhat'_k, in fp64."""
    total = 0.0
    for row, old_row in zip(logits, old, strict=True):
        p, q = softmax(row) ** (1 / temperature), softmax(old_row) ** (1 / temperature)
        p, q = p / p.sum(), q / q.sum()
        total -= sum(b * np.log(a) for a, b in zip(p, q, strict=True))
    return total / len(logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("shape", [(6, 4), (1, 1), (3, 2)])
def test_the_formula(shape, temperature):
    logits, old = 3 * torch.randn(2, *shape, dtype=torch.float64)
    expected = modified_cross_entropy(logits.numpy(), old.numpy(), temperature)
    assert lwf_loss(logits, old, temperature, rescale=False).item() == pytest.approx(expected, rel=1e-12)
    assert lwf_loss(logits, old, temperature).item() == pytest.approx(expected * temperature**2, rel=1e-12)
    # log-probabilities give the same as logits
    recorded = old.log_softmax(-1)
    assert lwf_loss(logits, recorded, temperature, rescale=False).item() == pytest.approx(expected, rel=1e-12)


def test_published_temperature():
    logits, old = torch.randn(2, 5, 3, dtype=torch.float64)
    assert (LwF().temperature, LwF().weight) == (2.0, 1.0)
    expected = 4 * modified_cross_entropy(logits.numpy(), old.numpy(), 2.0)
    assert lwf_loss(logits, old).item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_has_one_scale_at_every_temperature():
    """T (p' - q') / N, which tends to (o - o0 - their means) / (K N); without T^2 it vanishes as 1 / T^2."""
    logits, old = torch.randn(2, 5, 3, dtype=torch.float64)
    for temperature in (1.0, 2.0, 8.0):
        o, o0 = logits.clone().requires_grad_(), old.clone().requires_grad_()
        lwf_loss(o, o0, temperature).backward()
        expected = temperature * (softmax(logits.numpy() / temperature) - softmax(old.numpy() / temperature)) / 5
        np.testing.assert_allclose(o.grad.numpy(), expected, rtol=1e-10)
        assert o0.grad is None
    o = logits.clone().requires_grad_()
    lwf_loss(o, old, 1e4).backward()
    difference = logits - old
    limit = (difference - difference.mean(1, keepdim=True)) / 3 / 5
    torch.testing.assert_close(o.grad, limit, rtol=1e-3, atol=1e-6)


def test_masks_and_nothing():
    logits, old = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    expected = 4 * modified_cross_entropy(logits[mask].numpy(), old[mask].numpy(), 2.0)
    assert lwf_loss(logits, old, mask=mask).item() == pytest.approx(expected, rel=1e-12)
    assert lwf_loss(logits, old, mask=mask & False) == 0
    assert lwf_loss(logits[:0], old[:0]) == 0


class Heads(nn.Module):
    """The old head's logits; batches are needed by position and by name."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 3)

    def forward(self, x, shift=None):
        return self.head(self.body(x if shift is None else x + shift))


def test_recording():
    model, x = Heads(), torch.randn(11, 4)
    model.body[0].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model).eval()(x)
    batches = [x[:4], (x[4:8], torch.zeros(4)), [x[8:10], None], {"x": x[10:]}]
    lwf = LwF().record(model, batches)
    assert not lwf.recorded.requires_grad
    torch.testing.assert_close(lwf.recorded, expected.detach())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    shifted = LwF().record(model, [((x, torch.ones(11, 4)), None)])
    torch.testing.assert_close(shifted.recorded, copy.deepcopy(model).eval()(x + 1).detach())


def test_looking_up():
    model, x = Heads(), torch.randn(11, 4)
    lwf = LwF(temperature=3.0, weight=0.4).record(model, [x[:5], x[5:]])
    logits, indices = torch.randn(3, 3), torch.tensor([10, 0, 7])
    old = copy.deepcopy(model).eval()(x)[indices].detach()
    expected = 0.4 * 9 * modified_cross_entropy(logits.double().numpy(), old.double().numpy(), 3.0)
    assert lwf(logits, indices).item() == pytest.approx(expected, rel=1e-5)
    plain = LwF(temperature=3.0, rescale=False).record(model, [x])
    assert plain(logits, indices).item() == pytest.approx(expected / 0.4 / 9, rel=1e-5)


def test_online_is_the_same():
    model, x = Heads(), torch.randn(11, 4)
    for _ in range(3):
        model(torch.randn(9, 4))
    keys = set(model.state_dict())
    recorded, online = LwF(weight=0.3).record(model, [x]), OnlineLwF(model, weight=0.3)
    model.train()
    online.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for indices in torch.arange(9).split(3):
        loss = online(model(x[indices]), x[indices])
        torch.testing.assert_close(loss, online(model(x[indices]), x[indices]) * 0 + loss)
        loss.backward()
        optimizer.step()
        logits = torch.randn(3, 3)
        torch.testing.assert_close(online(logits, x[indices]), recorded(logits, indices))
    assert set(model.state_dict()) == keys
    assert not any(module.training for module in online.source.modules())


def test_sequences():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    units = torch.randint(9, (5, 7))
    lwf, mask = LwF().record(model, units.split(2)), units > 2
    logits = torch.randn(5, 7, 3)
    old = model(units).detach()
    expected = 4 * modified_cross_entropy(logits[mask].double().numpy(), old[mask].double().numpy(), 2.0)
    assert lwf(logits, torch.arange(5), mask).item() == pytest.approx(expected, rel=1e-5)
    assert OnlineLwF(model)(logits, units, mask=mask).item() == pytest.approx(expected, rel=1e-5)


def test_save_load_and_copies():
    """What is recorded comes back in a module that has recorded nothing, or something else."""
    model, x = Heads(), torch.randn(11, 4)
    lwf = LwF().record(model, [x])
    logits, indices = torch.randn(2, 3), torch.tensor([3, 10])
    for fresh in (LwF(), LwF().record(Heads(), [x[:2]]), nn.ModuleDict({"lwf": LwF()})):
        saved = nn.ModuleDict({"lwf": lwf}) if isinstance(fresh, nn.ModuleDict) else lwf
        fresh.load_state_dict(saved.state_dict())
        loaded = fresh["lwf"] if isinstance(fresh, nn.ModuleDict) else fresh
        assert torch.equal(loaded(logits, indices), lwf(logits, indices))
    assert torch.equal(copy.deepcopy(lwf)(logits, indices), lwf(logits, indices))
    assert lwf.double().recorded.dtype == torch.float64
    online = OnlineLwF(model)
    fresh = OnlineLwF(Heads())
    fresh.load_state_dict(online.state_dict())
    assert torch.equal(fresh(logits, x[:2]), online(logits, x[:2]))


def test_mistakes():
    model, x = Heads(), torch.randn(11, 4)
    with pytest.raises(ValueError, match="no outputs are recorded; call record"):
        LwF()(torch.zeros(1, 3), torch.tensor([0]))
    lwf = LwF().record(model, [x])
    for wrong in (11, -1):
        indices = torch.tensor([4, wrong])
        with pytest.raises(ValueError, match=f"indices are from {min(4, wrong)} to {max(4, wrong)}; outputs of 11 exa"):
            lwf(torch.zeros(2, 3), indices)
    with pytest.raises(ValueError, match=r"logits are \(2, 5\) and the old ones \(2, 3\)"):
        lwf(torch.zeros(2, 5), torch.tensor([0, 1]))
    assert lwf(torch.zeros(0, 3), torch.zeros(0).long()) == 0
    with pytest.raises(ValueError, match="batches hold no example"):
        LwF().record(model, [])
    with pytest.raises(ValueError, match=r"an example are \(2, 4\) in one batch and \(3, 4\) in another"):
        LwF().record(nn.Identity(), [torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)])
    with pytest.raises(ValueError, match=r"an output of shape \(44,\) for 11 examples; one row for each is needed"):
        LwF().record(nn.Flatten(0), [x])
    with pytest.raises(ValueError, match=r"mask is torch.bool of shape \(3,\); a boolean one of shape \(2,\)"):
        lwf(torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(3).bool())
    with pytest.raises(TypeError, match="a batch is a tuple of 3; inputs alone or a pair"):
        LwF().record(model, [(x, x, x)])
    with pytest.raises(TypeError, match="a batch's inputs are a str"):
        LwF().record(model, ["x"])
    with pytest.raises(TypeError, match="the model returns a tuple"):
        LwF().record(nn.LSTM(4, 2), [x])
    for temperature in (0.0, -2.0, float("nan"), float("inf")):
        for make in (LwF, lambda t: OnlineLwF(model, t), lambda t: lwf_loss(x, x, t)):
            with pytest.raises(ValueError, match=f"temperature is {temperature}; a positive"):
                make(temperature)
    with pytest.raises(ValueError, match="weight is -1"):
        LwF(weight=-1)
