import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import glomo
from glomo.kernels import use_backend
from parity import DTYPES, EXAMPLES, IMPLEMENTATIONS, PHASES, check_parity, random, strided, widest

SIZES = st.sampled_from([0, 1, 2, 5, 31, 130])


@settings(max_examples=EXAMPLES * 2 // 3, phases=PHASES)
@given(data=st.data())
def test_parity_over_shapes(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    lead = data.draw(st.sampled_from([(), (3,), (2, 4)]))
    t, s = data.draw(SIZES), data.draw(SIZES)
    e, ev = data.draw(st.sampled_from([1, 3, 16])), data.draw(st.sampled_from([1, 5, 33]))
    make = data.draw(st.sampled_from([random, strided]))
    kind, causal = data.draw(st.sampled_from(["none", "bool", "float"])), data.draw(st.booleans())
    mask_shape = data.draw(st.sampled_from([(1, s), (*lead, 1, s), (t, s), (*lead, t, s)]))
    mask = {"bool": torch.rand(mask_shape) > 0.3, "float": random(*mask_shape, dtype=dtype)}.get(kind)
    dropout_p = data.draw(st.sampled_from([0.0, 0.4]))

    def call(query, key, value, mask):
        return glomo.attention(query, key, value, mask, dropout_p, causal, return_lse=True)

    tensors = [make(*lead, t, e, dtype=dtype), make(*lead, s, e, dtype=dtype), make(*lead, s, ev, dtype=dtype), mask]
    check_parity(call, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "s", "scale"), [(130, 260, 20.0), (7, 1, 1.0), (64, 128, 5.0)])
def test_parity_with_large_scores_and_single_sources(dtype, t, s, scale):
    def call(query, key, value):
        return glomo.attention(query, key, value, scale=scale)

    check_parity(call, [random(2, t, 5, dtype=dtype), random(2, s, 5, dtype=dtype), random(2, s, 4, dtype=dtype)])


def run_both(arguments, options):
    """Ours and PyTorch's own, output and gradients."""
    results = []
    for function in (glomo.attention, F.scaled_dot_product_attention):
        inputs = [t.clone().requires_grad_(t.is_floating_point()) for t in arguments]
        out = function(*inputs, **options)
        wanted = [t for t in inputs if t.requires_grad]
        results.append([out, *torch.autograd.grad(out, wanted, torch.ones_like(out))])
    return results


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (None, {}),
        (None, dict(is_causal=True)),
        (None, dict(scale=0.2)),
        (None, dict(is_causal=True, enable_gqa=True)),
        ((1, 1, 1, 7), {}),
        ((2, 6, 5, 7), dict(enable_gqa=True)),
        ("float", {}),
    ],
)
def test_equals_pytorch(backend, mask, options):
    heads = 2 if options.get("enable_gqa") else 6
    arguments = [random(2, 6, 5, 4), random(2, heads, 7, 4), random(2, heads, 7, 3)]
    if mask == "float":
        arguments.append(random(6, 5, 7))
    elif mask is not None:
        allowed = torch.rand(mask) > 0.3
        allowed[..., 0] = True
        arguments.append(allowed)
    arguments = [t.to(widest(backend)) if t.is_floating_point() else t for t in arguments]
    with use_backend(backend):
        ours, theirs = run_both(arguments, options)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_fully_masked_rows_are_zero_in_value_and_gradient(backend, kind):
    query, key, value = (random(2, 4, 8).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 1] = False
    mask[1] = False
    if kind == "float":
        mask = torch.zeros(2, 4, 4).masked_fill(~mask, float("-inf")).requires_grad_()
    with use_backend(backend):
        out, lse = glomo.attention(query, key, value, mask, return_lse=True)
        (out.sum() + lse.masked_fill(lse == float("-inf"), 0).sum()).backward()
    assert (out[0, 1] == 0).all()
    assert (out[1] == 0).all()
    assert lse[0, 1] == float("-inf")
    assert (query.grad[0, 1] == 0).all()
    for t in (query.grad, key.grad, value.grad, *([mask.grad] if kind == "float" else [])):
        assert t.isfinite().all()
        assert (t[1] == 0).all()


def test_lse_is_the_log_of_the_sum_of_exponentials():
    query, key = random(3, 5, 4), random(3, 6, 4)
    _, lse = glomo.attention(query, key, key, return_lse=True)
    torch.testing.assert_close(lse, (query @ key.mT / 2).logsumexp(-1))


@pytest.mark.parametrize("backend", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("offset", [-1e4, -1e7, -1e9, torch.finfo(torch.float32).min])
def test_gradients_of_rows_with_a_large_lse(backend, offset):
    """lse absorbs the log of the sum there: weights made from it alone would not add up to 1, by a factor of 40."""
    tensors = [random(2, 40, 16) for _ in range(3)]
    results = []
    for name in (backend, "reference"):
        inputs = [t.clone().requires_grad_() for t in tensors]
        with use_backend(name):
            out = glomo.attention(*inputs, torch.tensor(offset))
        results.append(torch.autograd.grad(out.square().sum(), inputs))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_gradcheck_of_the_reference():
    tensors = [t.double().requires_grad_() for t in (random(2, 4, 3), random(2, 5, 3), random(2, 5, 2), random(4, 5))]
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda *t: glomo.attention(*t, return_lse=True), tensors)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (2, 3, 9, 7), (9, 7)])
@pytest.mark.parametrize("floating", [False, True])
def test_a_mask_and_the_diagonal_together(backend, shape, floating):
    """What PyTorch does with the diagonal in the mask."""
    tensors = [random(2, 3, 9, 4), random(2, 3, 7, 4), random(2, 3, 7, 5)]
    tensors = [t.to(widest(backend)).requires_grad_() for t in tensors]
    allowed = torch.rand(shape) > 0.3
    allowed[..., 0] = True
    earlier = torch.ones(9, 7, dtype=torch.bool).tril()
    with use_backend(backend):
        if floating:
            mask = torch.randn(shape, dtype=tensors[0].dtype)
            ours = glomo.attention(*tensors, mask, is_causal=True)
            mask = mask.expand(2, 3, 9, 7).masked_fill(~earlier, float("-inf"))
        else:
            mask = allowed
            ours = glomo.attention(*tensors, mask, is_causal=True)
            mask = mask & earlier
    theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, mask)
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(out.square().sum(), tensors) for out in (ours, theirs))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)
