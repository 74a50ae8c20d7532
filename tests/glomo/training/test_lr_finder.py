"""The range test: the rates it takes, that it changes nothing, and what it suggests."""

import math

import pytest
import torch
from support_transfer import ALONE, CONFIG, METHODS, make_task

from glomo.errors import UserError
from glomo.training.distributed import World
from glomo.training.lr_finder import find_rate


def test_rates_grow_and_nothing_is_changed():
    task = make_task("gradual")
    next(task.model.children()).eval().requires_grad_(False)
    begun = []
    task.fill = lambda: begun.append(len(begun))
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    flags = [p.requires_grad for p in task.model.parameters()], [m.training for m in task.model.modules()]
    found = find_rate(task, CONFIG, ALONE, 1e-5, 1e-1, steps=9)
    assert found["rates"] == pytest.approx([1e-5 * 10 ** (t / 2) for t in range(9)])
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert flags == ([p.requires_grad for p in task.model.parameters()], [m.training for m in task.model.modules()])
    assert all(p.grad is None for p in task.model.parameters())
    assert len(found["losses"]) == len(found["smooth"]) == 9
    assert begun == [0]
    mean = weight = 0.0
    for loss, smooth in zip(found["losses"], found["smooth"], strict=True):
        mean, weight = 0.9 * mean + loss, 0.9 * weight + 1
        assert smooth == pytest.approx(mean / weight)


def test_it_ends_where_the_loss_explodes():
    task = make_task("gradual")
    found = find_rate(task, CONFIG, ALONE, 1e-3, 1e12, steps=200)
    assert len(found["rates"]) < 200
    last = found["smooth"][-1]
    assert not math.isfinite(last) or last > 4 * min(found["smooth"])


@pytest.mark.parametrize("method", METHODS)
def test_the_suggestion_learns(method):
    """A quadratic falls fastest somewhere between too slow and too fast."""
    task = make_task(method)
    target = {name: p.detach() + 1 for name, p in task.model.named_parameters()}

    def loss(indices, generator):
        value = sum((p - target[name]).square().sum() for name, p in task.model.named_parameters())
        return value / 50, 1, 1

    task.loss = loss
    suggestion = find_rate(task, CONFIG, ALONE, 1e-6, 1e4)["suggestion"]
    assert 1e-3 < suggestion < 10


@pytest.mark.parametrize("seed", range(5))
def test_noise_suggests_nothing(seed):
    """Losses that no rate makes better."""
    task, generator = make_task("gradual"), torch.Generator().manual_seed(seed)
    zero = next(task.model.parameters())
    task.loss = lambda indices, _: (0 * zero.sum() + torch.rand((), generator=generator), 1, 1)
    assert find_rate(task, CONFIG, ALONE)["suggestion"] is None


def test_several_processes_are_refused():
    with pytest.raises(UserError, match="for one process"):
        find_rate(make_task("gradual"), CONFIG, World(0, 2, torch.device("cpu")))
