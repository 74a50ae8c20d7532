"""Consistency against its formulas in loops: who is sharpened, who is masked, and where no gradient goes."""

import copy
import math

import pytest
import torch
from torch import nn

from glomo.transfer.signal import ExponentialAverage, consistency_loss, consistency_ramp


def softmax(row, temperature=1.0):
    powers = [math.exp(z / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def expected(clean, perturbed, divergence, temperature, confidence):
    total = 0.0
    for z, other in zip(clean, perturbed, strict=True):
        p, q, k = softmax(z, temperature), softmax(other), len(z)
        if confidence is not None and not max(softmax(z)) > confidence:
            continue
        if divergence == "kl":
            total += sum(p[i] * (math.log(p[i]) - math.log(q[i])) for i in range(k))
        else:
            total += sum((p[i] - q[i]) ** 2 for i in range(k)) / k
    return total / len(clean)


def problem(rows=7, classes=3):
    generator = torch.Generator().manual_seed(rows)
    return [
        (1.5 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)
    ]


@pytest.mark.parametrize("divergence", ["kl", "squared"])
@pytest.mark.parametrize("temperature", [0.4, 1.0])
@pytest.mark.parametrize("confidence", [None, 0.0, 0.6, 1.0])
def test_the_formula(divergence, temperature, confidence):
    clean, perturbed = problem()
    found = consistency_loss(clean, perturbed, divergence, temperature, confidence)
    lists = clean.tolist(), perturbed.tolist()
    assert found.item() == pytest.approx(expected(*lists, divergence, temperature, confidence), rel=1e-11, abs=1e-15)
    torch.autograd.gradcheck(
        lambda q: consistency_loss(clean.detach(), q, divergence, temperature, confidence), perturbed
    )


def test_no_gradient_on_the_clean_side():
    for divergence in ("kl", "squared"):
        clean, perturbed = problem()
        consistency_loss(clean, perturbed, divergence).backward()
        assert clean.grad is None
        assert perturbed.grad.any()


def test_the_target_is_sharpened_and_not_the_student():
    """The gradient is (q - p_sharp) / B; dividing the student's logits by T would put another q and 1 / T there."""
    clean, perturbed = problem()
    consistency_loss(clean, perturbed, temperature=0.4).backward()
    sharp = torch.tensor([softmax(row, 0.4) for row in clean.tolist()], dtype=torch.float64)
    torch.testing.assert_close(perturbed.grad, (perturbed.detach().softmax(1) - sharp) / 7)


def test_confidence_is_that_before_sharpening():
    clean = torch.tensor([[1.0, 0.0]])  # 0.73; sharpened at 0.4: 0.92
    perturbed = torch.tensor([[0.0, 1.0]])
    assert consistency_loss(clean, perturbed, temperature=0.4, confidence=0.8).item() == 0
    assert consistency_loss(clean, perturbed, temperature=0.4, confidence=0.7).item() > 0


def test_unsure_examples_count_in_the_mean():
    clean = torch.tensor([[9.0, 0.0], [0.1, 0.0]])
    perturbed = torch.zeros(2, 2)
    alone = consistency_loss(clean[:1], perturbed[:1], confidence=0.9)
    torch.testing.assert_close(consistency_loss(clean, perturbed, confidence=0.9), alone / 2)


def test_nothing_left_is_zero():
    clean, perturbed = problem()
    for settings in ({"confidence": 1.0}, {"mask": torch.zeros(7, dtype=torch.bool)}):
        perturbed.grad = None
        loss = consistency_loss(clean, perturbed, **settings)
        loss.backward()
        assert loss.item() == 0
        assert (perturbed.grad == 0).all()
    assert consistency_loss(clean[:0], perturbed[:0]).item() == 0


@pytest.mark.parametrize("divergence", ["kl", "squared"])
def test_the_same_is_consistent(divergence):
    clean, _ = problem()
    assert consistency_loss(clean, clean, divergence).item() == pytest.approx(0, abs=1e-15)


def test_positions_and_a_mask():
    clean, perturbed = problem(12)
    mask = torch.arange(12).view(4, 3) % 4 != 1
    rows = mask.flatten()
    found = consistency_loss(
        clean.view(4, 3, 3), perturbed.view(4, 3, 3).masked_fill(~mask[..., None], math.nan), confidence=0.5, mask=mask
    )
    lists = clean[rows].tolist(), perturbed[rows].tolist()
    assert found.item() == pytest.approx(expected(*lists, "kl", 1.0, 0.5), rel=1e-11)


def test_half_precision():
    clean, perturbed = (logits.detach().bfloat16() for logits in problem())
    found = consistency_loss(clean, perturbed)
    torch.testing.assert_close(found, consistency_loss(clean.float(), perturbed.float()), rtol=0, atol=0)


def test_ramp():
    assert [consistency_ramp(e, 4) for e in (0, 1, 2, 4, 9)] == pytest.approx(
        [math.exp(-5), math.exp(-5 * 0.5625), math.exp(-1.25), 1, 1]
    )
    assert consistency_ramp(0, 0) == 1
    with pytest.raises(ValueError, match="epoch is -1 of 4"):
        consistency_ramp(-1, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perturbed": torch.zeros(7, 2)}, r"clean logits have the shape \(7, 3\) and perturbed \(7, 2\)"),
        ({"divergence": "js"}, "divergence is 'js'; 'kl' or 'squared' is needed"),
        ({"temperature": -1.0}, "temperature is -1.0; a number above 0"),
        ({"confidence": 1.2}, "confidence is 1.2; a number from 0 to 1"),
        ({"mask": torch.zeros(3, dtype=torch.bool)}, r"mask is torch.bool of shape \(3,\); .* \(7,\) is needed"),
    ],
)
def test_mistakes(change, message):
    clean, perturbed = problem()
    with pytest.raises(ValueError, match=message):
        consistency_loss(**{"clean": clean, "perturbed": perturbed, **change})


def test_a_mean_teacher_learns_by_following_alone_and_goes_on_after_a_kill():
    """No gradient reaches it, its BatchNorm's statistics follow the student's, and a restart changes nothing."""

    def make():
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        return student, ExponentialAverage(student, 0.9), torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)

    def run(student, teacher, optimizer, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x, noise = (torch.randn(8, 3, generator=generator) for _ in range(2))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(student(x), (x[:, 0] > 0).long())
            loss = loss + consistency_ramp(step, 10) * consistency_loss(teacher(x), student(x + 0.1 * noise), "squared")
            loss.backward()
            assert all(p.grad is None for p in teacher.parameters())
            optimizer.step()
            teacher.update_parameters(student)

    whole, killed, again = make(), make(), make()
    run(*whole, 0, 12)
    assert whole[1].module[1].running_mean.any()
    assert whole[1].module[1].num_batches_tracked == whole[0][1].num_batches_tracked == 24
    run(*killed, 0, 5)
    for part, saved in zip(again, killed, strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    run(*again, 5, 12)
    for one, other in zip(whole[:2], again[:2], strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )
