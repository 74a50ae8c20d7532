"""Elastic weight consolidation against known optima and written-out sums."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from glomo.transfer.closeness import EWC, OnlineEWC, diagonal_fisher


def made_up(model, seed):
    """A Fisher information for every parameter, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator, dtype=torch.float64) for n, p in model.named_parameters()}


def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator, dtype=p.dtype)


def values(model):
    return {name: p.detach().clone().numpy() for name, p in model.named_parameters()}


def make_model():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def test_the_formula_and_its_gradient():
    model = make_model()
    ewc, fisher = EWC(model, strength=3.0), made_up(model, 1)
    assert ewc() == 0
    anchors = values(model)
    ewc.consolidate(fisher)
    move(model, 2)
    total = 0.0
    for name, w in values(model).items():
        for f, a, b in zip(fisher[name].numpy().flat, w.flat, anchors[name].flat, strict=True):
            total += 3.0 / 2 * f * (a - b) ** 2
    assert ewc().item() == pytest.approx(total, rel=1e-12)
    ewc().backward()
    for name, p in model.named_parameters():
        expected = 3.0 * fisher[name].numpy() * (p.detach().numpy() - anchors[name])
        np.testing.assert_allclose(p.grad.numpy(), expected, rtol=1e-12)


def test_a_linear_model_ends_at_the_known_optimum():
    """Task A is remembered as 1/2 sum F (w - w_A)^2, task B is 1/2 mean (x w - y)^2: together they have their minimum
    at (X'X / n + lambda F)^-1 (X'y / n + lambda F w_A)."""
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    fisher, strength = torch.tensor([[0.0, 0.3, 20.0]], dtype=torch.float64), 0.8
    anchor = model.weight.detach().clone().numpy()[0]
    ewc = EWC(model, strength)
    ewc.consolidate({"weight": fisher})
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)

    def loss():
        optimizer.zero_grad()
        value = (model(x)[:, 0] - y).square().mean() / 2 + ewc()
        value.backward()
        return value

    optimizer.step(loss)
    penalty = strength * np.diag(fisher.numpy()[0])
    left = x.numpy().T @ x.numpy() / 20 + penalty
    expected = np.linalg.solve(left, x.numpy().T @ y.numpy() / 20 + penalty @ anchor)
    np.testing.assert_allclose(model.weight.detach().numpy()[0], expected, rtol=1e-7)


def test_only_what_the_old_task_needs_is_kept():
    """A logistic regression that never sees its last input has no Fisher information there."""
    x = torch.cat([torch.randn(50, 2), torch.zeros(50, 1)], 1)
    model = nn.Linear(3, 2)
    ewc = EWC(model, 100.0)
    ewc.consolidate(diagonal_fisher(model, [x], labels="all"))
    with torch.no_grad():
        model.weight[:, 2] += 5
    assert ewc() == 0
    with torch.no_grad():
        model.weight[:, 0] += 5
    assert ewc() > 1


def test_no_information_at_all():
    model = make_model()
    ewc = EWC(model, 3.0)
    ewc.consolidate({name: torch.zeros_like(p) for name, p in model.named_parameters()})
    move(model, 1)
    ewc().backward()
    assert ewc() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_online():
    """F~_t = gamma F~_{t-1} + F_t around the last weights."""
    model = make_model()
    online, total = OnlineEWC(model, strength=0.4, gamma=0.7), None
    for task in range(3):
        move(model, task)
        fisher = made_up(model, 10 + task)
        online.consolidate(fisher)
        total = fisher if total is None else {n: 0.7 * total[n] + f for n, f in fisher.items()}
    anchors = values(model)
    move(model, 5)
    expected = sum(
        0.2 * float((total[name].numpy() * (w - anchors[name]) ** 2).sum()) for name, w in values(model).items()
    )
    assert online().item() == pytest.approx(expected, rel=1e-12)


def test_consolidating_again():
    """EWC forgets the first task; OnlineEWC with gamma 0 is the same, with gamma 1 both count fully."""
    model = make_model()
    kinds = [EWC(model, 1.0), OnlineEWC(model, 1.0, gamma=0.0), OnlineEWC(model, 1.0)]
    for task in range(2):
        move(model, task)
        for penalty in kinds:
            penalty.consolidate(made_up(model, task))
    assert torch.equal(kinds[0].fisher.get_buffer("0.weight"), made_up(model, 1)["0.weight"])
    move(model, 3)
    assert kinds[0]() == kinds[1]()
    both = made_up(model, 0)["0.weight"] + made_up(model, 1)["0.weight"]
    torch.testing.assert_close(kinds[2].fisher.get_buffer("0.weight"), both)
    assert kinds[2].gamma == 1


def test_several_tasks_as_a_sum():
    model = make_model()
    penalties, expected = nn.ModuleList(), 0.0
    kept = []
    for task in range(2):
        move(model, task)
        penalties.append(EWC(model, 1.0))
        penalties[-1].consolidate(made_up(model, task))
        kept.append((values(model), made_up(model, task)))
    move(model, 7)
    for anchors, fisher in kept:
        expected += sum(
            0.5 * float((fisher[n].numpy() * (w - anchors[n]) ** 2).sum()) for n, w in values(model).items()
        )
    assert sum(p() for p in penalties).item() == pytest.approx(expected, rel=1e-12)
    assert not list(penalties.parameters())


def test_a_choice_of_parameters():
    model = make_model()
    ewc = EWC(model, 1.0, on=lambda name, p: not name.startswith("2."))
    fisher = diagonal_fisher(model, [torch.randn(5, 3).double()])
    ewc.consolidate(fisher)
    model[2] = nn.Linear(4, 9)  # another head
    assert ewc() == 0
    ewc.consolidate({**fisher, "2.weight": torch.zeros(9, 4)})


def test_it_remembers_the_old_task():
    """Two tasks that disagree: with the penalty the first is kept better, without it it is lost."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    first, second = (x[:, 0] > 0).long(), (x[:, 1] > 0).long()
    scores = {}
    for strength in (0.0, 300.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
        ewc = EWC(model, strength)
        for labels in (first, second):
            optimizer = torch.optim.SGD(model.parameters(), 0.05)
            for _ in range(300):
                optimizer.zero_grad()
                (nn.functional.cross_entropy(model(x), labels) + ewc()).backward()
                optimizer.step()
            ewc.consolidate(diagonal_fisher(model, [x], labels="all"))
        scores[strength] = (model(x).argmax(1) == first).float().mean().item()
    assert scores[300.0] > scores[0.0] + 0.1


def test_a_failed_consolidation_changes_nothing():
    model = make_model()
    ewc = EWC(model, 1.0)
    ewc.consolidate(made_up(model, 0))
    before = copy.deepcopy(ewc.state_dict())
    move(model, 1)
    good = made_up(model, 1)
    wrong = {
        r"nothing for the parameter '2\.bias'": {n: f for n, f in good.items() if n != "2.bias"},
        r"'2\.bias' is \(2,\) and its Fisher information \(3,\)": {**good, "2.bias": torch.ones(3)},
        r"of '2\.bias' has numbers that are negative or not finite": {**good, "2.bias": torch.tensor([1.0, -1.0])},
        r"of '2\.weight' has numbers that are neg": {**good, "2.weight": torch.full((2, 4), torch.nan)},
    }
    for message, fisher in wrong.items():
        with pytest.raises(ValueError, match=message):
            ewc.consolidate(fisher)
        assert all(torch.equal(value, before[name]) for name, value in ewc.state_dict().items())


def test_mistakes():
    with pytest.raises(ValueError, match="strength is -3"):
        EWC(make_model(), -3)
    for gamma in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"gamma is {gamma}; a number from 0 to 1"):
            OnlineEWC(make_model(), 1.0, gamma)
