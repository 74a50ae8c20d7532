"""Distillation against its formula written out in loops, and at the limits that are known."""

import math

import pytest
import torch

from glomo.transfer.signal import distillation_loss


def softmax(row, temperature):
    powers = [math.exp(z / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def expected(student, teachers, labels, alpha, temperature):
    """The formula, example by example and class by class."""
    total = 0.0
    for n, row in enumerate(student):
        q = softmax(row, temperature)
        each = [softmax(teacher[n], temperature) for teacher in teachers]
        p = [sum(one[k] for one in each) / len(each) for k in range(len(row))]
        kl = sum(p[k] * (math.log(p[k]) - math.log(q[k])) for k in range(len(row)))
        ce = -math.log(softmax(row, 1.0)[labels[n]])
        total += (1 - alpha) * ce + alpha * temperature**2 * kl
    return total / len(student)


def problem(rows=5, classes=3, teachers=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows * classes)
    student, *others = (3 * torch.randn(rows, classes, generator=generator, dtype=dtype) for _ in range(1 + teachers))
    return student.requires_grad_(), others, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("rows", "classes", "teachers"), [(1, 2, 1), (5, 3, 1), (4, 7, 3)])
def test_the_formula(alpha, temperature, rows, classes, teachers):
    student, others, labels = problem(rows, classes, teachers)
    teacher = others[0] if teachers == 1 else others
    found = distillation_loss(student, teacher, labels, alpha, temperature)
    lists = student.tolist(), [other.tolist() for other in others], labels.tolist()
    assert found.item() == pytest.approx(expected(*lists, alpha, temperature), rel=1e-12)
    torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, labels, alpha, temperature), student)


def test_one_teacher_in_a_list_is_that_teacher():
    student, others, _ = problem()
    torch.testing.assert_close(
        distillation_loss(student, others, alpha=1.0), distillation_loss(student, others[0], alpha=1.0)
    )


def test_several_teachers_are_a_mean_of_probabilities_and_not_of_logits():
    student, others, _ = problem(4, 3, teachers=2)
    found = distillation_loss(student, others, alpha=1.0, temperature=2.0)
    means = distillation_loss(student, (others[0] + others[1]) / 2, alpha=1.0, temperature=2.0)
    assert abs(found.item() - means.item()) > 0.01


def test_gradient_at_a_large_temperature():
    """T^2 KL tends to |z_s - z_t|^2 / 2K of centred logits, at every large T alike."""
    student, (teacher,), _ = problem(5, 4)
    difference = (student - student.mean(1, keepdim=True) - teacher + teacher.mean(1, keepdim=True)).detach()
    sizes = []
    for temperature in (1e2, 1e4):
        loss = distillation_loss(student, teacher, alpha=1.0, temperature=temperature)
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient, difference / 4 / 5, rtol=0.2, atol=50 / temperature)
        assert loss.item() == pytest.approx(difference.square().sum().item() / (2 * 4 * 5), rel=10 / temperature)
        sizes.append(gradient.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_classes_are_summed_and_not_averaged():
    """Classes that nobody predicts change nothing; a mean over classes would shrink with their number."""
    student, (teacher,), labels = problem(5, 3)
    more = torch.full((5, 9), -80.0, dtype=torch.float64)
    wide = [torch.cat([logits, more], 1) for logits in (student, teacher)]
    for temperature in (1.0, 2.0):
        torch.testing.assert_close(
            distillation_loss(*wide, labels, 0.7, temperature),
            distillation_loss(student, teacher, labels, 0.7, temperature),
        )


def test_nothing_flows_into_the_teacher():
    student, others, labels = problem(teachers=2)
    for other in others:
        other.requires_grad_()
    distillation_loss(student, others, labels).backward()
    assert student.grad.any()
    assert all(other.grad is None for other in others)


def test_the_same_logits_have_no_divergence():
    student, _, _ = problem()
    loss = distillation_loss(student, student, alpha=1.0, temperature=3.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-15)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-14, rtol=0)


def test_positions_and_a_mask():
    """(B, T, K): only what the mask takes counts, in both terms and in the mean; the rest may be anything."""
    student, (teacher,), labels = problem(12, 3)
    mask = torch.arange(12).view(3, 4) % 5 != 0
    labels = labels.view(3, 4).masked_fill(~mask, -7)
    shaped = student.view(3, 4, 3).masked_fill(~mask[..., None], math.nan)
    found = distillation_loss(shaped, teacher.view(3, 4, 3), labels, 0.4, 2.0, mask)
    rows = mask.flatten()
    lists = student[rows].tolist(), [teacher[rows].tolist()], labels.flatten()[rows].tolist()
    assert found.item() == pytest.approx(expected(*lists, 0.4, 2.0), rel=1e-12)
    found.backward()
    assert (student.grad[~rows] == 0).all()
    assert student.grad[rows].any()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_nothing_counts(alpha):
    student, (teacher,), labels = problem()
    loss = distillation_loss(student, teacher, labels, alpha, mask=torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()
    empty = student.detach()[:0].requires_grad_()
    assert distillation_loss(empty, teacher[:0], labels[:0], alpha).item() == 0


def test_classes_that_are_ruled_out():
    """-inf in both: as if the class were not there. In the teacher alone: it has probability 0 there."""
    student, (teacher,), labels = problem(5, 4)
    labels = labels.clamp(max=2)
    out = torch.arange(4) == 3
    loss = distillation_loss(student.masked_fill(out, -math.inf), teacher.masked_fill(out, -math.inf), labels, 0.5, 2.0)
    torch.testing.assert_close(loss, distillation_loss(student[:, :3], teacher[:, :3], labels, 0.5, 2.0))
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(gradient).all()
    alone = distillation_loss(student, teacher.masked_fill(out, -math.inf), alpha=1.0)
    assert torch.isfinite(alone)


def test_large_logits_are_stable():
    student = torch.tensor([[1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    loss = distillation_loss(student, [student.detach().flip(1), -student.detach()], alpha=1.0, temperature=1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    student, (teacher,), labels = problem(64, 50)
    student, teacher = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
    found = distillation_loss(student, teacher, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distillation_loss(student.float(), teacher.float(), labels), rtol=0, atol=0)
    found.backward()
    assert student.grad.dtype == dtype


def test_batch_mates_do_not_matter():
    student, (teacher,), labels = problem(6)
    singles = [distillation_loss(student[n : n + 1], teacher[n : n + 1], labels[n : n + 1]) for n in range(6)]
    torch.testing.assert_close(distillation_loss(student, teacher, labels), torch.stack(singles).mean())


def test_without_labels():
    student, (teacher,), labels = problem()
    free = distillation_loss(student, teacher, alpha=1.0, temperature=2.0)
    assert free == distillation_loss(student, teacher, labels, alpha=1.0, temperature=2.0)
    with pytest.raises(ValueError, match=r"labels are None and alpha is 0.9; without labels alpha must be 1"):
        distillation_loss(student, teacher, alpha=0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, r"alpha is 1.5; a number from 0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"temperature": 0.0}, "temperature is 0.0; a number above 0 is needed"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"teacher": torch.zeros(5, 4)}, r"student's logits have the shape \(5, 3\) and the teacher's \(5, 4\)"),
        ({"teacher": [torch.zeros(5, 3), torch.zeros(3)]}, r"the teacher's \(5, 3\), \(3,\)"),
        ({"teacher": []}, "the teacher's none; at least one teacher is needed"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels have the shape \(4,\) and logits \(5, 3\); .* \(5,\)"),
        ({"mask": torch.ones(5)}, r"mask is torch.float32 of shape \(5,\); a boolean one of shape \(5,\)"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask is torch.bool of shape \(4,\); .* \(5,\) is needed"),
    ],
)
def test_mistakes(change, message):
    student, (teacher,), labels = problem()
    with pytest.raises(ValueError, match=message):
        distillation_loss(**{"student": student, "teacher": teacher, "labels": labels, **change})


def test_a_class_without_any_probability_adds_nothing():
    """Its probability underflows in the teacher, and the student rules it out."""
    teacher, student = torch.tensor([[0.0, 5.0, -200.0]]), torch.tensor([[0.0, 5.0, -math.inf]], requires_grad=True)
    loss = distillation_loss(student, teacher, alpha=1.0, temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad.isfinite().all()
