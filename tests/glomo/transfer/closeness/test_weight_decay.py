"""Weight decay is off where a penalty pulls, and only there."""

import pytest
import torch
from torch import nn

from glomo.transfer import freeze_all_but_top, layer_groups, optimizer_groups
from glomo.transfer.closeness import EWC, L2SP, ConservativeParameters, without_decay


def model_and_groups():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))
    return model, layer_groups(model, {"lower": "0|1", "middle": "2", "head": "3"})


def described(made, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return [(g["name"], g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in made]


def test_the_groups():
    model, groups = model_and_groups()
    penalty = L2SP(model, on=lambda name, p: name in ("0.weight", "1.bias", "3.weight"))
    made = without_decay(optimizer_groups(groups, {"lower": 1.0, "middle": 2.0, "head": 3.0}, 0.5), penalty)
    assert described(made, model) == [
        ("lower", 1.0, 0.0, ["0.weight"]),
        ("lower", 1.0, 0.0, ["1.bias"]),
        ("lower", 1.0, 0.0, ["0.bias", "1.weight"]),
        ("middle", 2.0, 0.5, ["2.weight"]),
        ("middle", 2.0, 0.0, ["2.bias"]),
        ("head", 3.0, 0.0, ["3.weight"]),
        ("head", 3.0, 0.0, ["3.bias"]),
    ]
    assert sorted(n for *_, names in described(made, model) for n in names) == sorted(dict(model.named_parameters()))


def test_new_weights_do_not_decay_either():
    model, groups = model_and_groups()
    penalty = L2SP(model, {"0.weight": model[0].weight})
    made = described(without_decay(optimizer_groups(groups, 1.0, 0.5), penalty), model)
    assert all(decay == 0 for _, _, decay, names in made if "3.weight" in names)


def test_what_has_a_factor_of_0_decays():
    model, groups = model_and_groups()
    everything = optimizer_groups(groups, 1.0, 0.5)

    def decaying(penalty):
        return {
            n for _, _, decay, names in described(without_decay(everything, penalty), model) if decay for n in names
        }

    weights = {"0.weight", "2.weight", "3.weight"}
    source = {"0.weight": model[0].weight}
    assert decaying(L2SP(model, source, alpha=0.1, beta=0.0)) == weights - {"0.weight"}
    assert decaying(L2SP(model, source, alpha=0.0, beta=0.1)) == {"0.weight"}
    assert decaying(L2SP(model, source)) == set()
    for penalty in (EWC(model, 0.0), ConservativeParameters(model, 0.0), L2SP(model, source, 0.0, 0.0)):
        assert decaying(penalty) == weights
        assert penalty.pulled() == {}
    with pytest.raises(ValueError, match="none of the 1 parameters of EWC is among"):
        without_decay(everything, EWC(nn.Linear(2, 2, bias=False), 0.0))


def test_several_penalties_and_other_settings():
    model, _ = model_and_groups()
    groups = [{"params": model.parameters(), "betas": (0.1, 0.2)}]
    groups[0]["params"] = list(groups[0]["params"])
    first, second = EWC(model, 1.0, on=lambda n, p: n == "0.weight"), L2SP(model, on=lambda n, p: n == "2.weight")
    made = without_decay(groups, first, second)
    assert [len(g["params"]) for g in made] == [2, 6]
    assert made[0]["weight_decay"] == 0
    assert "weight_decay" not in made[1]  # the optimizer's own
    assert all(g["betas"] == (0.1, 0.2) for g in made)
    assert torch.optim.AdamW(made, weight_decay=0.3).param_groups[1]["weight_decay"] == 0.3
    assert len(groups) == 1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weights_stay_at_the_source(optimizer):
    """With weight decay left on, they end between the source and zero."""
    model, groups = model_and_groups()
    penalty = ConservativeParameters(model, 1.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = optimizer_groups(groups, 0.01, weight_decay=0.5)
    for groups_of, stays in ((without_decay(made, penalty), True), (made, False)):
        steps = optimizer(groups_of)
        for _ in range(20):
            steps.zero_grad()
            penalty().backward()
            steps.step()
        assert all(torch.equal(p, start[name]) for name, p in model.named_parameters()) == stays


def test_stages_work_as_before():
    model, groups = model_and_groups()
    penalty = L2SP(model)
    optimizer = torch.optim.SGD(without_decay(optimizer_groups(groups, 0.1, weight_decay=0.5), penalty))
    (stage,) = freeze_all_but_top(groups, steps=3, lr=0.2)
    stage.begin(model, groups, optimizer)
    stage.set_modes(model)
    stage.set_rates(optimizer, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (model(torch.randn(5, 4)).square().sum() + penalty()).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"3.weight", "3.bias"}
    assert [g["lr"] for g in optimizer.param_groups if g["name"] == "head"] == [0.2, 0.2]


def test_another_model():
    _, groups = model_and_groups()
    penalty = L2SP(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="none of the 1 parameters of L2SP is among the 8 of the groups"):
        without_decay(optimizer_groups(groups, 0.1), penalty)
