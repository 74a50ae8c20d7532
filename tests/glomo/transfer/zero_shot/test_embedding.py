"""Losses of a common space against their formulas in loops; the pull-only one collapses, the hinge learns."""

import numpy as np
import pytest
import torch
from torch import nn

from glomo.transfer.zero_shot import devise_loss, hit_at_k, label_scores, max_hinge_loss, pull_loss


def rows(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def max_hinge_oracle(f, g, classes, margin):
    total = 0.0
    for n in range(len(f)):
        wrong = [f[n] @ g[m] for m in range(len(f)) if classes[m] != classes[n]]
        if wrong:
            total += max(0.0, margin - f[n] @ g[n] + max(wrong))
    return total / len(f)


def devise_oracle(mv, table, targets, margin):
    unit = [t / np.sqrt((t**2).sum()) for t in table]
    total = 0.0
    for n, y in enumerate(targets):
        for j in range(len(unit)):
            if j != y:
                total += max(0.0, margin - unit[y] @ mv[n] + unit[j] @ mv[n])
    return total / len(targets)


@pytest.mark.parametrize("classes", [[0, 1, 2, 3, 4], [3, 3, 0, 3, 0], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("margin", [0.1, 1.0, 3.0])
def test_the_hinge_of_the_nearest(classes, margin):
    f, g = rows(5, 3), rows(5, 3, 1)[torch.tensor(classes)]
    found = max_hinge_loss(f, g, torch.tensor(classes), margin).item()
    assert found == pytest.approx(max_hinge_oracle(f.numpy(), g.numpy(), classes, margin), rel=1e-12)
    assert (found > 0) == (len(set(classes)) > 1)


@pytest.mark.parametrize(("b", "c", "d"), [(1, 2, 3), (4, 7, 5), (6, 1, 2)])
def test_devise(b, c, d):
    mv, table, targets = rows(b, d), 5 * rows(c, d, 1), torch.arange(b) % c
    for margin in (0.1, 2.0):
        found = devise_loss(mv, table, targets, margin).item()
        assert found == pytest.approx(devise_oracle(mv.numpy(), table.numpy(), targets.tolist(), margin), rel=1e-12)
    assert devise_loss(mv, table, targets).item() == devise_loss(mv, table, targets, 0.1).item()


def test_the_sum_and_the_nearest_differ():
    """Two wrong labels that come too near: the lecture's hinge takes the larger, DeViSE adds them up."""
    f = torch.tensor([[1.0, 0.0, 0.0]] * 3)
    g = torch.eye(3)
    table = torch.tensor([[0.0, 1.0, 0.0], [0.8, 0.6, 0.0], [0.6, 0.8, 0.0]])
    assert devise_loss(f[:1], table, torch.tensor([0]), 0.1).item() == pytest.approx(0.9 + 0.7)
    assert max_hinge_loss(f, table, torch.arange(3), 0.1).item() == pytest.approx((0.9 + 0.0 + 0.3) / 3)
    assert max_hinge_loss(5 * g, g, torch.arange(3), 4.9).item() == 0


def test_it_is_zero_exactly_where_the_pair_wins_by_the_margin():
    g, classes = torch.eye(2, dtype=torch.float64), torch.arange(2)
    assert max_hinge_loss(g, g, classes, 1.0).item() == 0
    assert max_hinge_loss(g, g, classes, 1.001).item() == pytest.approx(0.001)
    assert devise_loss(g, 9 * g, classes, 1.0).item() == 0
    assert devise_loss(g, 9 * g, classes, 1.001).item() == pytest.approx(0.001)


@pytest.mark.parametrize("loss", [max_hinge_loss, lambda f, g, c: devise_loss(f, g, c, 1.0)])
def test_it_pulls_the_pair_together_and_pushes_others_away(loss):
    """With the sign turned (margin + right + wrong) it would push the right label away."""
    g = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    f = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    loss(f, g, torch.arange(2)).backward()
    torch.testing.assert_close(-f.grad, torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=torch.float64))


def test_examples_of_one_class_are_no_negatives_of_each_other():
    f, g, classes = rows(3, 4), rows(2, 4, 1), torch.tensor([0, 1, 1])
    doubled = max_hinge_loss(f, g[classes], classes, 0.5)
    alone = [max_hinge_oracle(f[[0, i]].numpy(), g.numpy(), [0, 1], 0.5) for i in (1, 2)]
    # example 0 is in both pairs: each pair's loss is (loss of 0 + loss of i) / 2
    own = max(0.0, 0.5 - (f[0] @ g[0]).item() + (f[0] @ g[1]).item())
    assert doubled.item() == pytest.approx((2 * alone[0] + 2 * alone[1] - own) / 3, rel=1e-12)


@pytest.mark.parametrize(
    "loss", [max_hinge_loss, lambda f, g, c: devise_loss(f, g, c, 0.7), lambda f, g, c: pull_loss(f, g)]
)
def test_gradients(loss):
    f, g = rows(5, 3).requires_grad_(), rows(5, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, g: loss(f, g, torch.arange(5)), (f, g))


def test_no_negative_leaves_no_gradient():
    f = rows(2, 3).requires_grad_()
    max_hinge_loss(f, rows(2, 3), torch.tensor([4, 4])).backward()
    assert not f.grad.any()
    assert max_hinge_loss(f[:1], rows(1, 3), torch.tensor([4])).item() == 0


def test_pull_and_scores():
    f, g = rows(3, 4), rows(3, 4, 1)
    assert pull_loss(f, g).item() == pytest.approx(((f - g).numpy() ** 2).sum() / 3, rel=1e-12)
    table = rows(5, 4, 2)
    expected = np.array([[a @ b for b in table.numpy()] for a in f.numpy()])
    np.testing.assert_allclose(label_scores(f, table).numpy(), expected, rtol=1e-12)
    norms = np.linalg.norm(f.numpy(), axis=1)[:, None] * np.linalg.norm(table.numpy(), axis=1)
    np.testing.assert_allclose(label_scores(f, table, cosine=True).numpy(), expected / norms, rtol=1e-12)
    zero = torch.zeros(1, 4)
    assert label_scores(zero, table.float(), cosine=True).tolist() == [[0.0] * 5]
    assert label_scores(f, table[:0]).shape == (3, 0)


def test_dtypes_and_autocast():
    f, g, classes = rows(9, 6, dtype=torch.float32), rows(9, 6, 1, torch.float32), torch.arange(9)
    for loss in (max_hinge_loss, devise_loss, lambda f, g, c: pull_loss(f, g)):
        exact = loss(f, g, classes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(f, g, classes), exact)
        half = loss(f.bfloat16(), g.bfloat16(), classes)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)


def toy(seed):
    """Eight classes of 16 noisy examples each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(8).repeat_interleave(16)
    centres = torch.randn(8, 24, generator=torch.Generator().manual_seed(9))
    return centres[labels] + 0.5 * torch.randn(128, 24, generator=generator), labels


def trained(loss):
    """Both sides learn for 400 steps. Returns the spread of the labels before and after, and what other examples are
    taken for, and are."""
    torch.manual_seed(0)
    f, g = nn.Linear(24, 6), nn.Embedding(8, 6)
    optimizer = torch.optim.Adam([*f.parameters(), *g.parameters()], 0.05)
    (x, y), (test_x, test_y) = toy(0), toy(1)
    before = g.weight.std(0).mean().item()
    for _ in range(400):
        optimizer.zero_grad()
        loss(f(x), g.weight, y).backward()
        optimizer.step()
    with torch.no_grad():
        return before, g.weight.std(0).mean().item(), label_scores(f(test_x), g.weight), test_y


def test_pulling_alone_collapses():
    before, after, scores, y = trained(lambda f, table, y: pull_loss(f, table[y]))
    assert before > 0.9
    assert after < 0.005
    assert len(scores.argmax(1).unique()) == 1  # everything is taken for one class
    assert hit_at_k(scores, y) == 1 / 8


@pytest.mark.parametrize("loss", [lambda f, table, y: max_hinge_loss(f, table[y], y), devise_loss])
def test_the_hinge_learns(loss):
    _, after, scores, y = trained(loss)
    assert after > 0.9
    assert hit_at_k(scores, y) > 0.95


def test_a_class_that_was_never_seen():
    """Labels are rows of attributes, g is learned: an unseen row lies where its examples are."""
    generator = torch.Generator().manual_seed(0)
    table = torch.tensor([[int(b) for b in f"{n:04b}"] for n in range(16)]).float()
    looks = torch.randn(4, 12, generator=generator)
    seen, unseen = [n for n in range(16) if n not in (6, 9, 13)], [6, 9, 13]
    labels = torch.tensor(seen).repeat_interleave(12)
    inputs = table[labels] @ looks + 0.2 * torch.randn(len(labels), 12, generator=generator)
    torch.manual_seed(0)
    f, g = nn.Linear(12, 8), nn.Linear(4, 8)
    optimizer = torch.optim.Adam([*f.parameters(), *g.parameters()], 0.02)
    for _ in range(400):
        optimizer.zero_grad()
        max_hinge_loss(f(inputs), g(table[labels]), labels).backward()
        optimizer.step()
    targets = torch.arange(3).repeat_interleave(30)
    tests = table[unseen][targets] @ looks + 0.2 * torch.randn(90, 12, generator=generator)
    assert hit_at_k(label_scores(f(tests), g(table[unseen])), targets) > 0.9


def test_mistakes():
    f, g, y = torch.zeros(3, 2), torch.zeros(4, 2), torch.arange(3)
    with pytest.raises(ValueError, match=r"inputs have the shape \(3, 2\) and labels \(4, 2\), classes \(3,\)"):
        max_hinge_loss(f, g, y)
    with pytest.raises(ValueError, match=r"inputs have the shape \(3, 2\) and labels \(4, 2\); two times \(B, dim\)"):
        pull_loss(f, g)
    with pytest.raises(ValueError, match=r"targets \(2,\); one target for each input"):
        devise_loss(f, g, y[:2])
    with pytest.raises(ValueError, match=r"labels \(4, 5\); \(inputs, dim\) and \(labels, dim\)"):
        label_scores(f, torch.zeros(4, 5))
    for loss in (max_hinge_loss, devise_loss):
        with pytest.raises(ValueError, match=r"margin is 0; above 0"):
            loss(f, f, y, 0)
        with pytest.raises(ValueError, match=r"at least 1"):
            loss(f[:0], f[:0], y[:0])
    with pytest.raises(ValueError, match=r"at least 1"):
        pull_loss(f[:0], f[:0])
