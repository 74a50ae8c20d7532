"""What moves in a stage and what does not."""

import dataclasses

import pytest
import torch
from support_transfer import copy_of, moved, net_and_groups, step
from torch import nn

from glomo.transfer import Stage, layer_groups, optimizer_groups, trainable_table
from glomo.transfer.schedules import linear
from glomo.transfer.structure import add, bottleneck

OF_HEAD = {"head.weight", "head.bias"}


def of_layer(n, statistics=True):
    names = {f"layers.{n}.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    kept = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    free = tuple(name.replace("1.", "3.") for name in kept)
    return names | {f"layers.{n}.{name}" for name in (*kept, *free)} if statistics else names


@pytest.mark.parametrize(
    ("learning", "expected"),
    [
        (("head",), OF_HEAD),
        (("layers.1",), of_layer(1)),
        (("layers.0", "head"), of_layer(0) | OF_HEAD),
        (("embedding", "layers.0", "layers.1", "head"), {"embedding.weight"} | of_layer(0) | of_layer(1) | OF_HEAD),
    ],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_exactly_the_named_parameters_move(learning, expected, weight_decay):
    """Not by gradients, momentum, weight decay or running statistics: after a stage in which all moved."""
    net, groups = net_and_groups()
    optimizer = torch.optim.AdamW(optimizer_groups(groups, 0.1, weight_decay))
    everything = Stage("all", 2, {group.name: 0.1 for group in groups})
    for stage in (everything, Stage("some", 3, dict.fromkeys(learning, 0.1))):
        stage.begin(net, groups, optimizer)
        before = copy_of(net)
        for n in range(stage.steps):
            stage.set_modes(net)
            stage.set_rates(optimizer, n)
            step(net, optimizer, n)
    assert moved(net, before) == expected
    frozen = [p for group in groups if group.name not in learning for p in group.parameters.values()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_modes():
    """A frozen BatchNorm is in evaluation mode, its neighbour without parameters too; dropout only where asked for."""
    net, groups = net_and_groups()
    optimizer = torch.optim.SGD(optimizer_groups(groups, 0.1))
    for frozen, dropout in (("train", True), ("eval", False)):
        stage = Stage("head", 1, {"layers.1": 0.1, "head": 0.1}, frozen=frozen)
        stage.begin(net, groups, optimizer)
        stage.set_modes(net)
        assert [m.training for m in net.layers[0]] == [dropout, False, dropout, False]
        assert all(m.training for m in net.layers[1])
        assert net.head.training
    Stage("all", 1, {group.name: 0.1 for group in groups}).begin(net, groups, optimizer)
    stage.set_modes(net)
    assert all(m.training for m in net.modules())


def test_rates_and_moments():
    net, groups = net_and_groups()
    optimizer = torch.optim.AdamW(optimizer_groups(groups, 0.1))
    stage = Stage("top", 4, {"layers.1": 0.2, "head": 1.0}, linear)
    stage.begin(net, groups, optimizer)
    stage.set_rates(optimizer, 1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0, 0, 0.1, 0.5])
    spanning = dataclasses.replace(stage, first=4, span=10)
    spanning.set_rates(optimizer, 1, scale=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0, 0, 0.04, 0.2])

    step(net, optimizer)
    stage.begin(net, groups, optimizer)
    assert net.head.weight in optimizer.state
    dataclasses.replace(stage, fresh=True).begin(net, groups, optimizer)
    assert net.head.weight not in optimizer.state


@pytest.mark.parametrize(
    ("rates", "steps", "sentence"),
    [
        ({}, 1, "stage 's' trains nothing; the layer groups are embedding, layers.0, layers.1, head"),
        ({"heads": 1.0}, 1, "stage 's' trains 'heads', but the layer groups are embedding"),
        ({"head": 1.0}, 0, "stage 's' has 0 steps"),
    ],
)
def test_mistakes(rates, steps, sentence):
    net, groups = net_and_groups()
    with pytest.raises(ValueError, match=sentence):
        Stage("s", steps, rates).begin(net, groups, torch.optim.SGD(optimizer_groups(groups, 0.1)))


def test_an_optimizer_that_was_not_made_of_the_groups():
    net, groups = net_and_groups()
    with pytest.raises(ValueError, match="no parameter group named 'embedding'"):
        Stage("s", 1, {"head": 1.0}).begin(net, groups, torch.optim.SGD(net.parameters(), lr=0.1))


def test_the_table():
    _, groups = net_and_groups()
    table = trainable_table(Stage("top", 4, {"head": 0.5}), groups)
    assert table.splitlines()[0] == "stage top: 15 of 99 parameters learn"
    assert table.splitlines()[1].split() == ["embedding", "28", "frozen"]
    assert table.splitlines()[4].split() == ["head", "15", "rate", "0.5"]


def test_an_adapter_in_a_frozen_batchnorm_leaves_it_frozen():
    norm = nn.BatchNorm1d(4).requires_grad_(False)
    add(norm, "", bottleneck(2, width=4))
    net = nn.Sequential(nn.Linear(4, 4), norm)
    groups = layer_groups(net, ["0", "1"])
    stage = Stage("all", 1, {group.name: 1.0 for group in groups})
    stage.set_modes(net)
    assert not norm.training
    assert norm.adapter.training
