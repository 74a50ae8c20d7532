"""Schedules and optimizers as the [train] section asks for them."""

import copy

import pytest
import torch
from torch import nn

from glomo.training.averaging import AveragedSGD, weights_to_judge
from glomo.training.train_config import TrainConfig, make_optimizer, schedule_of
from glomo.transfer import layer_groups


@pytest.mark.parametrize(
    ("decay", "end"),
    [("constant", 1.0), ("linear", 0.0), ("cosine", 0.0), ("plateau", 1.0), ("inverse-sqrt", (2 / 12) ** 0.5)],
)
def test_rates_rise_then_fall_and_are_never_negative(decay, end):
    factor = schedule_of(TrainConfig(steps=12, warmup=2, decay=decay))
    factors = [factor(step, 12) for step in range(40)]  # also past the last step
    assert factors[:2] == [0.5, 1.0]
    assert factors[11] == pytest.approx(end, abs=1e-12)
    assert min(factors) >= 0


def test_slanted_triangular():
    factor = schedule_of(TrainConfig(steps=100, decay="slanted-triangular", cut_frac=0.2, ratio=4.0))
    assert [factor(step, 100) for step in (0, 20, 60)] == [0.25, 1.0, 0.625]


def test_optimizers():
    model = nn.ModuleDict({"bottom": nn.Linear(2, 2), "top": nn.Linear(2, 1)})
    groups = layer_groups(model, ["bottom", "top"])
    adamw = make_optimizer(groups, TrainConfig(weight_decay=0.1))
    found = [(g["name"], len(g["params"]), g["weight_decay"]) for g in adamw.param_groups]
    assert found == [("bottom", 1, 0.1), ("bottom", 1, 0.0), ("top", 1, 0.1), ("top", 1, 0.0)]
    sgd = make_optimizer(groups, TrainConfig(optimizer="sgd", momentum=0.2, lr=8.0))
    found = [(g["momentum"], g["lr"], len(g["params"])) for g in sgd.param_groups]
    assert found == [(0.2, 8.0, 2), (0.2, 8.0, 2)]


def test_averaged_sgd():
    """Means against sums by hand, in and out of a saved state."""
    model = nn.Linear(3, 1, bias=False)
    optimizer = AveragedSGD(model.parameters(), lr=0.1)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.arange(6.0).view(2, 3)).square().sum().mul(0.01).backward()
        optimizer.step()
        return model.weight.detach().clone()

    step(model, optimizer)
    with weights_to_judge(optimizer):
        before = model.weight.detach().clone()
    assert torch.equal(before, model.weight)
    optimizer.start_averaging()
    seen = [step(model, optimizer) for _ in range(3)]

    other = nn.Linear(3, 1, bias=False)
    other.load_state_dict(model.state_dict())
    resumed = AveragedSGD(other.parameters(), lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.averaging
    for m, o in ((model, optimizer), (other, resumed)):
        last = step(m, o)
        with weights_to_judge(o):
            torch.testing.assert_close(m.weight, torch.stack([*seen, last]).mean(0))
        assert torch.equal(m.weight, last)
