"""Gradient reversal against derivatives written out, its schedules against the published numbers."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from glomo.transfer import schedule
from glomo.transfer.domains import (
    DANN_RATE,
    GradientReversal,
    dann_rate_factor,
    dann_weight,
    gradient_reversal,
)

# 2 / (1 + exp(-10 p)) - 1, by hand to four places
PUBLISHED = {0: 0.0, 0.01: 0.0500, 0.1: 0.4621, 0.25: 0.8483, 0.5: 0.9866, 0.75: 0.9989, 1: 0.9999}


def test_the_weight_is_the_published_one():
    for p, value in PUBLISHED.items():
        assert dann_weight(round(100 * p), 100) == pytest.approx(value, abs=6e-5)
    for step in range(0, 1001, 7):
        assert dann_weight(step, 1000) == pytest.approx(2 / (1 + math.exp(-10 * step / 1000)) - 1, abs=1e-15)
    assert dann_weight(1, 10**12) == pytest.approx(5e-12, rel=1e-9)  # no digits are lost where it begins
    assert dann_weight(500, 100) == dann_weight(100, 100) == pytest.approx(0.99990920)  # past the end it stays
    assert dann_weight(-3, 100) == 0


def test_another_gamma_ends_too_low():
    """With the alpha of 1 that some programs have, the weight ends at 0.46."""
    assert dann_weight(100, 100, gamma=1) == pytest.approx(0.4621, abs=5e-5)
    assert GradientReversal(100).gamma == 10


def test_the_rate_is_the_published_one():
    for p, value in {0: 0.01, 0.1: 0.005946, 0.5: 0.002609, 1: 0.001656}.items():
        assert DANN_RATE * dann_rate_factor(round(10 * p), 10) == pytest.approx(value, abs=6e-7)
    assert dann_rate_factor(99, 10) == dann_rate_factor(10, 10)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], DANN_RATE, momentum=0.9)
    scheduler = schedule(optimizer, dann_rate_factor, steps=4)
    for step in range(4):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / (1 + 10 * step / 4) ** 0.75)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.0, 0.25, 3.0, "tensor"])
def test_forward_is_the_identity_and_backward_turns_the_gradient(dtype, weight):
    weight = torch.tensor([0.7], requires_grad=True) if weight == "tensor" else weight
    x = torch.tensor([[1.0, -2.0, 0.0]], dtype=dtype, requires_grad=True)
    y = gradient_reversal(x, weight)
    assert torch.equal(y, x)
    assert y.dtype == dtype
    (y**3).sum().backward()
    number = weight.item() if isinstance(weight, torch.Tensor) else weight
    expected = [[-number * 3 * value**2 for value in (1.0, -2.0, 0.0)]]
    torch.testing.assert_close(x.grad, torch.tensor(expected, dtype=dtype))
    assert not isinstance(weight, torch.Tensor) or weight.grad is None


def test_shapes_without_elements_or_dimensions():
    for shape in ((), (0,), (2, 0, 3)):
        x = torch.zeros(shape, requires_grad=True)
        gradient_reversal(x, 2.0).sum().backward()
        torch.testing.assert_close(x.grad, torch.full(shape, -2.0))


def test_only_what_is_below_is_reversed():
    """The domain classifier itself learns to tell domains apart: its gradient keeps its sign."""
    torch.manual_seed(0)
    below, above, x = nn.Linear(3, 4).double(), nn.Linear(4, 1).double(), torch.randn(5, 3, dtype=torch.float64)
    above(below(x)).square().mean().backward()
    usual = [p.grad.clone() for p in (*below.parameters(), *above.parameters())]
    below.zero_grad()
    above.zero_grad()
    above(gradient_reversal(below(x), 0.3)).square().mean().backward()
    turned = [p.grad for p in (*below.parameters(), *above.parameters())]
    for i, (new, old) in enumerate(zip(turned, usual, strict=True)):
        torch.testing.assert_close(new, -0.3 * old if i < 2 else old)


def test_double_backward():
    """d/dx of the gradient -w 3 x^2 is -w 6 x; through the reversed loss once more it is turned again."""
    x = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((x.clone() ** 3).sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], 6 * x.detach())
    (first,) = torch.autograd.grad((gradient_reversal(x, 0.4) ** 3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, -0.4 * 3 * x**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 0.4 * 0.4 * 6 * x.detach())  # the inner 3 y^2 holds y = reversal(x)


def test_the_modules_weight_follows_its_steps():
    reversal = GradientReversal(steps=50)
    found = []
    for _ in range(60):
        found.append(reversal.weight.item())
        reversal(torch.zeros(2))  # forwards do not count, however many
        reversal.eval()
        reversal(torch.zeros(2))
        reversal.advance()
    expected = [2 / (1 + math.exp(-10 * min(1, step / 50))) - 1 for step in range(60)]
    assert found == pytest.approx(expected, abs=2e-7)
    assert "steps=50" in repr(reversal)


def test_progress_is_over_all_training():
    """Epochs of a long and a short loader: p ends at 1, and is not p = a / E + 1 / len of a forgotten bracket, nor that
    of the shorter loader, which would run past 1."""
    epochs, longer, shorter = 4, 10, 3
    reversal = GradientReversal(steps=epochs * longer)
    for epoch in range(epochs):
        for batch in range(longer):
            p = (epoch * longer + batch) / (epochs * longer)
            assert reversal.weight.item() == pytest.approx(math.tanh(5 * p), abs=2e-7)
            reversal.advance()
    assert dann_weight(longer, epochs * shorter) > 0.99  # what the shorter would give after one epoch of four
    assert dann_weight(longer, epochs * longer) == pytest.approx(0.8483, abs=5e-5)


def test_the_step_is_saved(tmp_path):
    reversal = GradientReversal(steps=9)
    for _ in range(4):
        reversal.advance()
    save_file(reversal.state_dict(), tmp_path / "state.safetensors")
    restored = GradientReversal(steps=9)
    restored.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for other in (restored, copy.deepcopy(reversal)):
        assert torch.equal(other.weight, reversal.weight)
        other.advance()
        assert other.step.item() == 5
    assert reversal.step.item() == 4
    assert list(reversal.state_dict()) == ["step"]
    assert reversal.to(torch.bfloat16).step.dtype == torch.int64  # a cast of the model loses no steps


def test_a_step_between_forward_and_backward():
    reversal = GradientReversal(steps=10)
    reversal.advance()
    x, weight = torch.ones(2, requires_grad=True), reversal.weight
    y = reversal(x).sum()
    reversal.advance()
    y.backward()
    torch.testing.assert_close(x.grad, -weight.expand(2))


def test_compiled_once_for_all_steps():
    torch._dynamo.reset()
    counter, reversal = CompileCounter(), GradientReversal(steps=20)
    compiled = torch.compile(lambda x: reversal(x * 2).square().sum(), backend=counter, fullgraph=True)
    for step in range(20):
        x = torch.tensor([3.0], requires_grad=True)
        compiled(x).backward()
        assert x.grad.item() == pytest.approx(-24 * math.tanh(5 * step / 20), abs=1e-5)
        reversal.advance()
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_compiled_ahead_of_time():
    torch._dynamo.reset()
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    compiled = torch.compile(lambda x, w: (gradient_reversal(x, w) * 3).sum(), backend="aot_eager", fullgraph=True)
    compiled(x, 0.5).backward()
    assert x.grad.tolist() == [-1.5, -1.5]
    torch._dynamo.reset()


def test_mistakes():
    with pytest.raises(TypeError, match=r"type torch.int64; a gradient needs a floating-point type"):
        gradient_reversal(torch.ones(2, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match=r"weight is -1.0; at least 0 is needed"):
        gradient_reversal(torch.ones(2), -1.0)
    with pytest.raises(ValueError, match=r"weight is nan"):
        gradient_reversal(torch.ones(2), math.nan)
    with pytest.raises(ValueError, match=r"weight has the shape \(2,\); one number is needed"):
        gradient_reversal(torch.ones(2), torch.ones(2))
    for make in (GradientReversal, lambda steps: dann_weight(0, steps), lambda steps: dann_rate_factor(0, steps)):
        with pytest.raises(ValueError, match=r"steps is 0; the training needs at least 1"):
            make(0)
    with pytest.raises(ValueError, match=r"gamma is 0; above 0 is needed"):
        GradientReversal(5, gamma=0)
