"""Ops are called directly where nobody watches, and through PyTorch's dispatcher where somebody does."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch._library import custom_ops
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import glomo
from glomo.kernels import cpu_library, registration, use_backend
from parity import DEVICE, random


@pytest.fixture(autouse=True)
def _blocked():
    with use_backend("blocked"):
        yield


@pytest.fixture
def direct(monkeypatch):
    """What is_plain answered to the calls so far."""
    answers, ask = [], registration.is_plain

    def note(tensors):
        answers.append(ask(tensors))
        return answers[-1]

    monkeypatch.setattr(registration, "is_plain", note)
    return answers


def call(query):
    return glomo.relu2_attention(query, query, query, 0.5)


def forward_and_gradient(query):
    query = query.detach().requires_grad_()
    out = call(query)
    return out, torch.autograd.grad(out.square().sum(), query)[0]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_plain_calls_are_direct_and_equal_those_of_the_dispatcher(direct, monkeypatch):
    query = random(2, 5, 4)
    found = forward_and_gradient(query)
    assert direct == [True, True]
    monkeypatch.setattr(registration, "is_plain", lambda tensors: False)
    for a, b in zip(found, forward_and_gradient(query), strict=True):
        assert torch.equal(a, b)


def test_parameters_autocast_and_inference_mode_are_plain(direct):
    query = random(2, 5, 4)
    expected = call(query)
    call(torch.nn.Parameter(query))
    with torch.autocast(DEVICE, torch.bfloat16):
        call(query)
    with torch.inference_mode():
        assert torch.equal(call(query), expected)
        assert torch.equal(call(query.clone()), expected)
    with torch.no_grad():
        assert not call(query.clone().requires_grad_()).requires_grad
    assert len(direct) == 6
    assert all(direct)


def test_a_dispatch_mode_sees_the_op():
    """torch.utils.checkpoint's policies and flop counters are such modes."""
    with Seen() as mode:
        forward_and_gradient(random(2, 5, 4))
    assert any("relu2_attention_blocked.default" in name for name in mode.names)


def test_a_profiler_sees_the_op():
    with torch.profiler.profile() as profile:
        call(random(2, 5, 4))
    assert "glomo::relu2_attention_blocked" in {event.key for event in profile.key_averages()}


def test_lazy_negatives_are_resolved(direct):
    """The imaginary part of a conjugate is a tensor that is still to be negated."""
    query = torch.complex(random(2, 5, 4), random(2, 5, 4)).conj().imag
    assert query.is_neg()
    for a, b in zip(forward_and_gradient(query), forward_and_gradient(query.resolve_neg()), strict=True):
        assert torch.equal(a, b)
    assert not direct[0]


def test_subclasses_take_the_dispatcher(direct):
    class Named(torch.Tensor):
        pass

    query = random(2, 5, 4)
    assert torch.equal(call(query.as_subclass(Named)).as_subclass(torch.Tensor), call(query))
    assert direct == [False, True]


def test_saved_tensors_are_checked_for_changes():
    query = random(2, 5, 4).requires_grad_()
    scaled = query * 1.0
    out = call(scaled)
    scaled.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_tensor_hooks_are_heard():
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        call(random(2, 5, 4).requires_grad_())
    assert packed


def test_no_second_derivative():
    query = random(2, 5, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(call(query).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="is not differentiable itself"):
        gradient.sum().backward()


def test_inference_mode_records_nothing_even_where_gradients_are_enabled():
    query, bias = random(2, 5, 4), torch.nn.Parameter(torch.zeros(()))
    with torch.inference_mode(), torch.enable_grad():
        assert not glomo.relu2_attention(query, query, query, bias).requires_grad


def test_compiled_autograd_traces_the_gradient():
    query = random(2, 5, 4).requires_grad_()
    expected = torch.autograd.grad(call(query).sum(), query)[0]
    torch._dynamo.reset()
    loss = call(query).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    assert torch.equal(query.grad, expected)


def test_a_tangent_of_the_cotangent_is_refused():
    query = random(2, 5, 4).requires_grad_()
    out = call(query)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="reverse-mode gradients"):
        torch.autograd.grad(out, query, forward_ad.make_dual(torch.ones_like(out), torch.randn_like(out)))


def test_a_function_mode_sees_the_op(direct):
    class Names(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names = []
    with Names():
        call(random(2, 5, 4))
    assert any("relu2_attention_blocked" in name for name in names)
    with torch.device("cpu"):  # a default device is such a mode, too, and concerns new tensors only
        call(random(2, 5, 4))
    assert direct == [False, True]


def test_vmap():
    query, key, value = (torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = torch.vmap(glomo.relu2_attention, in_dims=(0, 1, None))(query, key.transpose(0, 1), value[0])
    expected = torch.stack([glomo.relu2_attention(q, k, value[0]) for q, k in zip(query, key, strict=True)])
    torch.testing.assert_close(out, expected)
    inputs = (query, key, value)
    grads = (torch.autograd.grad(o.square().sum(), inputs) for o in (out, expected))
    torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="no slices"):
        torch.vmap(glomo.relu2_attention)(query[:0], key[:0], value[:0])


@pytest.mark.skipif(cpu_library.MISSING is not None, reason="saves what only the C++ kernels save")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vmap_saves_what_the_gradient_needs(dtype):
    """Of a tensor of slices nobody sees that it requires a gradient; lse alone loses the sum at scores of -1e9."""
    x = torch.randn(3, 70, 16, dtype=dtype, requires_grad=True)
    mask = torch.zeros(70, 70)
    mask[1::2] = -1e9

    def gradient(together, x):
        out = torch.vmap(attend)(x) if together else torch.stack([attend(one) for one in x])
        return torch.autograd.grad(out.double().square().sum(), x)[0].double()

    def attend(x):
        return glomo.attention(x, x, x, mask.to(x.dtype))

    with use_backend("reference"):
        exact = gradient(False, x.detach().double().requires_grad_())
    with use_backend("cpu"):
        errors = [(gradient(together, x) - exact).abs().max() for together in (True, False)]
    assert errors[0] <= 1.5 * errors[1] + 1e-6


def test_vmap_with_dropout():
    query = torch.randn(1, 2, 64, 16).expand(3, -1, -1, -1)

    def masks(randomness):
        return torch.vmap(lambda q: glomo.attention(q, q, q, dropout_p=0.5), randomness=randomness)(query)

    assert torch.equal(*masks("same")[:2])
    assert not torch.equal(*masks("different")[:2])
    with pytest.raises(RuntimeError, match="randomness"):
        masks("error")


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_batch_of_gradients():
    inputs = [torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = glomo.attention(*inputs)
    grads = torch.randn(6, *out.shape, dtype=torch.float64)
    found = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(out, inputs, grad, retain_graph=True) for grad in grads]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*singly, strict=True))))
    jacobian = torch.autograd.functional.jacobian(glomo.attention, tuple(inputs), vectorize=True)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(glomo.attention, tuple(inputs)))


def test_the_folders_own_name_is_another_name_for_the_same_ops(monkeypatch):
    """transformers imports it, in the root. A second registration would free what the first ops point to."""
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.syspath_prepend(Path(glomo.__file__).parents[1])
    before = torch.ops.glomo.attention_cpu.default
    kernels = importlib.import_module("kernels")
    assert kernels.attention is glomo.kernels.attention
    assert custom_ops.OPDEFS["glomo::attention_cpu"]._opoverload is before
    assert not [name for name in sys.modules if name.startswith("kernels.")]
    monkeypatch.delitem(sys.modules, "kernels")
