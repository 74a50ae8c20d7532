"""Shared trunks against the same modules called by hand; the parts of other tasks stay as they are, to the bit."""

import copy

import pytest
import torch
from torch import nn

from glomo.transfer.signal import SharedBottom, SharedMiddle, TaskSampler, task_batches, weighted_loss

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


class Pair(nn.Module):
    """A trunk with two inputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x, scale):
        return self.linear(x) * scale


def bottom():
    torch.manual_seed(0)
    heads = {"tag": nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), "score": nn.Linear(4, 1)}
    return SharedBottom(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), heads)


def middle():
    torch.manual_seed(0)
    inputs = {"de": nn.EmbeddingBag(7, 4), "en": nn.EmbeddingBag(9, 4)}
    return SharedMiddle(inputs, nn.Linear(4, 4), {"de": nn.Linear(4, 2), "en": nn.Linear(4, 3)})


INPUTS = {"de": torch.tensor([[1, 6, 2]]), "en": torch.tensor([[8, 3], [1, 2]])}


def state_of(model, optimizer):
    """Copies of what a checkpoint has of each parameter and buffer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]} {key}": torch.as_tensor(value).clone()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }
    return {**{name: value.clone() for name, value in model.state_dict().items()}, **moments}


def test_shared_bottom_is_the_head_on_the_trunk():
    model, x = bottom().eval(), torch.randn(5, 3)
    for task, head in model.heads.items():
        torch.testing.assert_close(model(task, x), head(model.trunk(x)), rtol=0, atol=0)


def test_several_inputs():
    model = SharedBottom(Pair(), {"a": nn.Linear(3, 2)})
    x = torch.randn(4, 5)
    expected = model.heads["a"](model.trunk.linear(x) * 3.0)
    torch.testing.assert_close(model("a", x, 3.0), expected, rtol=0, atol=0)
    torch.testing.assert_close(model.only("a")(x, 3.0), expected, rtol=0, atol=0)


def test_shared_middle_is_its_parts_in_a_row():
    model = middle()
    for task, x in INPUTS.items():
        expected = model.heads[task](model.trunk(model.inputs[task](x)))
        torch.testing.assert_close(model(task, x), expected, rtol=0, atol=0)
        torch.testing.assert_close(model.only(task)(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("make", [bottom, middle])
def test_a_step_leaves_the_other_tasks_parts_to_the_bit(make, kind):
    """Also once momentum has built up there, and with weight decay; their statistics too."""
    model = make()
    optimizer = OPTIMIZERS[kind](model.parameters())
    tasks = list(model.heads)
    for step in range(8):
        task = tasks[step % 2]
        other = tasks[1 - step % 2]
        before = state_of(model, optimizer)
        optimizer.zero_grad()
        x = INPUTS[task] if make is middle else torch.randn(6, 3)
        model(task, x).square().sum().backward()
        assert all(p.grad is None for p in model.heads[other].parameters())
        optimizer.step()
        after = state_of(model, optimizer)
        for name in before:
            if f".{other}." in name:
                assert torch.equal(before[name], after[name]), name
        assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith("trunk."))
        assert any(not torch.equal(before[n], after[n]) for n in before if f"heads.{task}." in n)


@pytest.mark.parametrize(("make", "task", "parts"), [(bottom, "tag", "trunk head"), (middle, "en", "input trunk head")])
def test_only_shares_the_weights(make, task, parts):
    model = make()
    alone = model.only(task)
    assert [name for name, _ in alone.named_children()] == parts.split()
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.zero_()
    assert all((p == 0).all() for p in [*model.trunk.parameters(), *model.heads[task].parameters()])
    shared = {id(p) for p in model.parameters()}
    assert {id(p) for p in alone.parameters()} < shared
    copied = copy.deepcopy(alone)
    assert not {id(p) for p in copied.parameters()} & shared


@pytest.mark.parametrize("make", [bottom, middle])
def test_save_and_load_and_copies(make):
    model, other = make(), make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), copy.deepcopy(model).parameters(), strict=True))


def test_a_run_that_was_killed_goes_on_identically():
    def run(model, optimizer, first, last):
        sampler = TaskSampler({"tag": 30, "score": 10}, 7, seed=4)
        rows = torch.arange(4.0)[:, None]
        data = {
            "tag": lambda n: (rows + n % 5).expand(4, 3),
            "score": lambda n: (rows - n % 5).expand(4, 3),
        }
        for _, task, batch in task_batches(sampler, data, last, first):
            optimizer.zero_grad()
            loss = {task: model(task, batch).square().mean()}
            weighted_loss(loss, {"tag": 1.0, "score": 0.3}).backward()
            optimizer.step()

    whole = bottom()
    run(whole, OPTIMIZERS["adamw"](whole.parameters()), 0, 20)
    killed = bottom()
    optimizer = OPTIMIZERS["adamw"](killed.parameters())
    run(killed, optimizer, 0, 11)
    again = bottom()
    again.load_state_dict(killed.state_dict())
    fresh = OPTIMIZERS["adamw"](again.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(again, fresh, 11, 20)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_weighted_loss():
    losses = {"a": torch.tensor(2.0, requires_grad=True), "b": torch.tensor(3.0, requires_grad=True)}
    loss = weighted_loss(losses, {"a": 0.5, "b": 10.0, "c": 7.0})
    assert loss.item() == 0.5 * 2 + 10 * 3
    loss.backward()
    assert (losses["a"].grad.item(), losses["b"].grad.item()) == (0.5, 10.0)
    assert weighted_loss({"b": losses["b"]}, {"a": 1.0, "b": 0.0}).item() == 0


def test_mistakes():
    linear = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="task 'x' is unknown; there are tag, score"):
        bottom()("x", torch.zeros(1, 3))
    with pytest.raises(ValueError, match="task 'x' is unknown; there are de, en"):
        middle().only("x")
    with pytest.raises(ValueError, match="inputs are of the tasks a, b, and heads of b, c"):
        SharedMiddle({"a": linear, "b": linear}, linear, {"b": linear, "c": linear})
    with pytest.raises(ValueError, match="there is no task"):
        SharedBottom(linear, {})
    for name in ("wmt.de", "", "keys"):
        with pytest.raises(ValueError, match=f"'{name}' cannot be a task's name"):
            SharedBottom(linear, {name: linear})
    with pytest.raises(ValueError, match="no task's loss"):
        weighted_loss({}, {"a": 1.0})
    with pytest.raises(ValueError, match="task 'b' has a loss and no weight; there are weights of a"):
        weighted_loss({"b": torch.zeros(())}, {"a": 1.0})
    with pytest.raises(ValueError, match="the weight of task 'a' is -1"):
        weighted_loss({"a": torch.zeros(())}, {"a": -1.0})
