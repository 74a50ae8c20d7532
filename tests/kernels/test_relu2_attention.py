import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import glomo
from glomo.kernels import use_backend
from parity import DTYPES, EXAMPLES, IMPLEMENTATIONS, INTERPRETED, PHASES, check_parity, random, strided, widest

SIZES = st.sampled_from([0, 1, 2, 3, 5, 17, 31, 130])


@settings(max_examples=EXAMPLES, phases=PHASES)
@given(data=st.data())
def test_parity_over_shapes(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    lead = data.draw(st.sampled_from([(), (3,), (2, 4), (2, 1, 4)]))
    t, s = data.draw(SIZES), data.draw(SIZES)
    e, ev = data.draw(st.sampled_from([1, 3, 16, 40])), data.draw(st.sampled_from([1, 5, 33]))
    make = data.draw(st.sampled_from([random, strided]))
    bias_shape = data.draw(st.sampled_from([None, (), (*lead[-1:], 1, 1), (*lead, t, 1), (1, s), (*lead, t, s)]))
    mask_shape = data.draw(st.sampled_from([None, (1, s), (*lead, 1, s), (t, s), (*lead, t, s)]))
    options = dict(
        is_causal=data.draw(st.booleans()),
        diagonal=data.draw(st.sampled_from([0, -1, 2])),
        scale=data.draw(st.sampled_from([1.0, 0.3])),
        eps=data.draw(st.sampled_from([1e-6, 0.0])),
        dropout_p=data.draw(st.sampled_from([0.0, 0.4])),
    )
    torch.manual_seed(data.draw(st.integers(0, 100)))
    mask = None if mask_shape is None else torch.rand(mask_shape) > 0.3
    bias = None if bias_shape is None else random(*bias_shape, dtype=data.draw(st.sampled_from([dtype, torch.float32])))

    def call(query, key, value, bias):
        return glomo.relu2_attention(query, key, value, bias, mask, return_normalizer=True, **options)

    check_parity(
        call, [make(*lead, t, e, dtype=dtype), make(*lead, s, e, dtype=dtype), make(*lead, s, ev, dtype=dtype), bias]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead_k", [(2, 2), (1, 2)])
def test_parity_with_grouped_heads(dtype, lead_k):
    def call(query, key, value, bias):
        return glomo.relu2_attention(query, key, value, bias, is_causal=True, enable_gqa=True, return_normalizer=True)

    tensors = [random(2, 6, 9, 8, dtype=dtype), random(*lead_k, 9, 8, dtype=dtype), random(*lead_k, 9, 5, dtype=dtype)]
    check_parity(call, [*tensors, random(6, 9, 1)])
    check_parity(call, [*tensors, random(2, 1, 1, 9)])


def test_parity_over_several_tiles():
    """Long enough that heads, targets and causal edges fall into different tiles."""

    def call(query, key, value, bias):
        return glomo.relu2_attention(query, key, value, bias, is_causal=True, diagonal=-1, return_normalizer=True)

    b, t = (1, 100) if INTERPRETED else (3, 700)
    check_parity(call, [random(b, 2, t, 8), random(b, 2, t, 8), random(b, 2, t, 8), random(b, 2, t, 1)])


def test_broadcast_leading_dimensions():
    def call(query, key, value):
        return glomo.relu2_attention(query, key, value)

    check_parity(call, [random(3, 1, 5, 4), random(2, 6, 4), random(3, 2, 6, 4)])
    check_parity(call, [random(5, 4), random(2, 6, 4), random(6, 3)])


def test_zero_stride_and_overlapping_views():
    def call(query, key, value):
        return glomo.relu2_attention(query.expand(4, 9, 8), key.as_strided((4, 9, 8), (0, 4, 1)), value)

    check_parity(call, [random(1, 8), random(60), random(4, 9, 8)])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_dead_rows_are_zero_in_value_and_gradient(backend, eps, dtype):
    """No positive score, all sources masked, the first row of a strictly causal graph, no source at all."""
    dtype = widest(backend) if dtype == torch.float64 else dtype
    query, key, value = (random(2, 4, 8, dtype=dtype).requires_grad_() for _ in range(3))
    bias = torch.zeros(2, 4, 1).to(dtype)
    bias[0] = -1000.0
    bias.requires_grad_()
    mask = torch.ones(2, 1, 4, dtype=torch.bool)
    mask[1] = False
    with use_backend(backend):
        out, z = glomo.relu2_attention(query, key, value, bias, mask, eps=eps, return_normalizer=True)
        (out.sum() + z.sum()).backward()
        first = glomo.relu2_attention(query, key, value, eps=eps, is_causal=True, diagonal=-1)[:, 0]
        none = glomo.relu2_attention(query, key[:, :0], value[:, :0], eps=eps)
    for t in (out, z, query.grad, key.grad, value.grad, bias.grad, first, none):
        assert (t == 0).all()


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("magnitude", [1e-3, 400.0])
def test_fp16_squares_neither_overflow_nor_underflow(backend, magnitude):
    """400² is beyond fp16's largest number, (1e-3)² below what it holds to three digits."""
    query = torch.full((3, 1), magnitude, dtype=torch.float16)
    key = torch.tensor([[1.0], [0.5], [0.25]], dtype=torch.float16)
    value = torch.eye(3, dtype=torch.float16)
    with use_backend(backend):
        out = glomo.relu2_attention(query, key, value, eps=0.0)
    expected = key.double().square().mT / key.double().square().sum()
    torch.testing.assert_close(out.double(), expected.expand(3, 3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_huge_scores_and_values_do_not_overflow_in_between(backend):
    """The squares are near fp32's largest number, their product with the value would be beyond it."""
    with use_backend(backend):
        out = glomo.relu2_attention(torch.full((1, 1), 1e18), torch.ones(2, 1), torch.full((2, 1), 1e3))
    assert out.item() == pytest.approx(1e3)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("score", [1e-2, 1e-4, 1e-6, 1e-18])
def test_gradients_near_dead_rows_are_finite_and_right(backend, score):
    """The gradient of the normalised square grows as 1 / s near a dead row; nothing on the way may overflow."""
    query = torch.tensor([[score]], requires_grad=True)
    key, value = torch.tensor([[1.0], [0.5]]), torch.tensor([[1.0], [0.0]])
    with use_backend(backend):
        out = glomo.relu2_attention(query, key, value, bias=torch.tensor([[0.0, score / 2]]), eps=0.0)
        out.backward(torch.ones_like(out))
    # s = (q, q/2 + c) with c = q/2 held: A_1 = q² / (q² + (q/2 + c)²), dA_1/dq at c = q/2 is 1 / (4 q)
    assert out.item() == pytest.approx(0.5, rel=1e-5)
    assert query.grad.item() == pytest.approx(0.25 / score, rel=1e-4)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_normalizer_adds_up_over_slices_of_the_sources(backend):
    query, key, value = (t.to(widest(backend)) for t in (random(2, 5, 4), random(2, 9, 4), random(2, 9, 3)))
    with use_backend(backend):
        whole = glomo.relu2_attention(query, key, value, eps=0.0)
        parts = [
            glomo.relu2_attention(query, key[:, s], value[:, s], eps=0.0, return_normalizer=True)
            for s in (slice(0, 4), slice(4, 9))
        ]
    merged = sum(out * z[..., None] for out, z in parts) / sum(z for _, z in parts)[..., None]
    torch.testing.assert_close(merged, whole, **({"rtol": 1e-4, "atol": 1e-6} if backend == "triton" else {}))


def test_dropout_keeps_the_mean_and_the_normalizer():
    batch, repeats = (8, 40) if INTERPRETED else (64, 200)
    query, key, value = random(batch, 8, 8), random(batch, 8, 8), random(batch, 8, 8)
    plain, z = glomo.relu2_attention(query, key, value, return_normalizer=True)
    torch.manual_seed(0)
    runs = [glomo.relu2_attention(query, key, value, dropout_p=0.5, return_normalizer=True) for _ in range(repeats)]
    assert all(torch.equal(r[1], z) for r in runs)
    assert not torch.equal(runs[0][0], runs[1][0])
    mean = torch.stack([r[0] for r in runs]).mean(0)
    assert (mean - plain).abs().mean() < (0.25 if INTERPRETED else 0.1) * plain.abs().mean()
    torch.manual_seed(0)
    assert torch.equal(glomo.relu2_attention(query, key, value, dropout_p=0.5), runs[0][0])


def test_one_gradient_alone():
    tensors = [random(2, 5, 4), random(2, 6, 4), random(2, 6, 3), random(5, 1)]
    whole = [t.clone().requires_grad_() for t in tensors]
    glomo.relu2_attention(*whole).sum().backward()
    for i, reference in enumerate(whole):
        alone = [t.clone().requires_grad_(j == i) for j, t in enumerate(tensors)]
        glomo.relu2_attention(*alone).sum().backward()
        torch.testing.assert_close(alone[i].grad, reference.grad)


def test_nan_and_inf_stay_in_their_rows():
    query, key, value = random(1, 6, 4), random(1, 6, 4), random(1, 6, 4)
    query[0, 2, 1] = float("nan")
    out = glomo.relu2_attention(query, key, value)
    assert out[0, 2].isnan().all()
    assert out[0, [0, 1, 3, 4, 5]].isfinite().all()


def test_gradcheck_of_the_reference():
    tensors = [t.double().requires_grad_() for t in (random(2, 4, 3), random(2, 5, 3), random(2, 5, 2), random(4, 1))]
    with use_backend("reference"):
        for dropout_p in (0.0, 0.3):

            def call(*inputs, dropout_p=dropout_p):
                torch.manual_seed(0)
                return glomo.relu2_attention(*inputs, eps=1e-4, dropout_p=dropout_p, return_normalizer=True)

            assert torch.autograd.gradcheck(call, tensors)
            assert torch.autograd.gradgradcheck(call, tensors)


def test_second_derivatives_name_the_way_out():
    query = random(1, 3, 4).requires_grad_()
    out = glomo.relu2_attention(query, query, query)
    (gradient,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
        gradient.sum().backward()


@pytest.mark.parametrize("mode", ["jvp", "dual", "grad", "vjp"])
def test_other_kinds_of_derivatives_name_the_way_out(mode):
    """Forward-mode derivatives would otherwise lose the tangent without a word."""
    query, tangent = random(1, 3, 4), random(1, 3, 4)

    def call(q):
        return glomo.relu2_attention(q, q, q).sum()

    def derive():
        if mode == "jvp":
            return torch.func.jvp(call, (query,), (tangent,))[1]
        if mode == "grad":
            return (torch.func.grad(call)(query) * tangent).sum()
        if mode == "vjp":
            return (torch.func.vjp(call, query)[1](torch.ones(()))[0] * tangent).sum()
        with torch.autograd.forward_ad.dual_level():
            out = call(torch.autograd.forward_ad.make_dual(query, tangent))
            return torch.autograd.forward_ad.unpack_dual(out).tangent

    with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
        derive()
    leaf = query.clone().requires_grad_()
    call(leaf).backward()
    with use_backend("reference"):
        torch.testing.assert_close(derive(), (leaf.grad * tangent).sum())


def test_inputs_stay_as_they_are():
    """Squaring in place is quicker, and wrong where somebody else reads the tensor."""
    tensors = [random(2, 5, 4), random(2, 5, 4), random(2, 5, 3), random(5, 1)]
    for backend in IMPLEMENTATIONS:
        inputs = [t.clone().requires_grad_() for t in tensors]
        with use_backend(backend):
            glomo.relu2_attention(*inputs, is_causal=True).sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(inputs, tensors, strict=True))
