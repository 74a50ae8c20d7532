"""A run that is killed in the middle and goes on from what was saved ends in the same bits."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from glomo.transfer.closeness import (
    EWC,
    L2SP,
    ConservativeOutputs,
    ConservativeParameters,
    LwF,
    OnlineEWC,
    OnlineLwF,
    diagonal_fisher,
    without_decay,
)

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(2))


def make_model():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


def consolidated(penalty, model):
    penalty.consolidate(diagonal_fisher(model, [X]))
    return penalty


ON_WEIGHTS = {
    "L2SP": (lambda m: L2SP(m, {n: p for n, p in m.state_dict().items() if n[0] == "0"}), L2SP),
    "ConservativeParameters": (lambda m: ConservativeParameters(m, 0.1),) * 2,
    "EWC": (lambda m: consolidated(EWC(m, 5.0), m), lambda m: EWC(m, 5.0)),
    "OnlineEWC": (lambda m: consolidated(OnlineEWC(m, 5.0, 0.9), m), lambda m: OnlineEWC(m, 5.0, 0.9)),
}
ON_OUTPUTS = {
    "ConservativeOutputs": (lambda m: ConservativeOutputs(m, 0.5),) * 2,
    "OnlineLwF": (OnlineLwF, OnlineLwF),
    "LwF": (lambda m: LwF().record(m, X.split(7)), lambda m: LwF()),
}


def train(model, penalty, optimizer, steps, name):
    for step in steps:
        torch.manual_seed(step)
        indices = torch.randint(40, (6,))
        optimizer.zero_grad()
        logits = model(X[indices])
        if name in ON_WEIGHTS:
            extra = penalty()
        else:
            extra = penalty(logits, indices if name == "LwF" else X[indices])
        (cross_entropy(logits, Y[indices]) + extra).backward()
        optimizer.step()
        if name == "OnlineEWC" and step == 2:
            consolidated(penalty, model)


def made_optimizer(model, penalty, name):
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    return torch.optim.SGD(without_decay(groups, penalty) if name in ON_WEIGHTS else groups, 0.1, momentum=0.9)


@pytest.mark.parametrize("name", [*ON_WEIGHTS, *ON_OUTPUTS])
def test_a_killed_run_goes_on(name, tmp_path):
    build, rebuild = {**ON_WEIGHTS, **ON_OUTPUTS}[name]

    def start():
        torch.manual_seed(0)
        model = make_model()
        penalty = build(model)
        return model, penalty, made_optimizer(model, penalty, name)

    whole = start()
    train(*whole, range(10), name)
    first = start()
    train(*first, range(5), name)
    save_file(first[0].state_dict(), tmp_path / "model")
    save_file(first[1].state_dict(), tmp_path / "penalty")
    torch.save(first[2].state_dict(), tmp_path / "optimizer")
    torch.manual_seed(99)
    model = make_model()  # from nothing: other weights, no source, no old data
    penalty = rebuild(model)
    optimizer = made_optimizer(model, penalty, name)
    model.load_state_dict(load_file(tmp_path / "model"))
    penalty.load_state_dict(load_file(tmp_path / "penalty"))
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer", weights_only=True))
    train(model, penalty, optimizer, range(5, 10), name)
    for again, expected in ((model, whole[0]), (penalty, whole[1])):
        for key, value in expected.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
