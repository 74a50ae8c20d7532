import math

import pytest
import torch

import glomo
from glomo.kernels import use_backend
from parity import DTYPES, IMPLEMENTATIONS, check_parity, random, strided, widest


def by_loops(query, key, bias, allowed, scale, eps):
    """A[t, j] written out in Python floats."""
    rows = []
    for t in range(query.shape[0]):
        squares = []
        for j in range(key.shape[0]):
            s = scale * sum(float(a) * float(b) for a, b in zip(query[t], key[j], strict=True)) + float(bias[t, j])
            squares.append(max(s, 0.0) ** 2 if allowed[t, j] else 0.0)
        z = math.fsum(squares)
        rows.append([x / (z + eps) if z else 0.0 for x in squares])
    return torch.tensor(rows, dtype=torch.float64).reshape(query.shape[0], key.shape[0])


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize(("is_causal", "diagonal"), [(False, 0), (True, 0), (True, -1), (True, 2), (True, -9)])
def test_formula(backend, is_causal, diagonal):
    query, key, bias = (t.to(widest(backend)) for t in (random(5, 3), random(7, 3), random(5, 7)))
    mask = torch.rand(5, 7) > 0.3
    allowed = mask & torch.ones(5, 7, dtype=torch.bool).tril(diagonal) if is_causal else mask
    with use_backend(backend):
        graph = glomo.relu2_affinity(
            query, key, bias, mask, is_causal=is_causal, diagonal=diagonal, scale=0.5, eps=1e-3
        )
    expected = by_loops(query, key, bias, allowed, 0.5, 1e-3)
    rtol, atol = (1e-4, 1e-6) if widest(backend) == torch.float32 else (1e-12, 1e-14)
    torch.testing.assert_close(graph.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_shape", [(), (3, 1, 1), (2, 1, 5, 1), (1, 7), (2, 3, 5, 7)])
def test_parity(dtype, bias_shape):
    mask = torch.rand(2, 1, 1, 7) > 0.3

    def call(query, key, bias):
        return glomo.relu2_affinity(query, key, bias, mask, is_causal=True, diagonal=1)

    check_parity(call, [strided(2, 3, 5, 16, dtype=dtype), strided(2, 3, 7, 16, dtype=dtype), random(*bias_shape)])


def test_gradcheck_of_the_reference():
    tensors = [random(2, 4, 3).double(), random(1, 5, 3).double(), random(4, 1).double()]
    tensors = [t.requires_grad_() for t in tensors]
    with use_backend("reference"):
        call = lambda q, k, b: glomo.relu2_affinity(q, k, b, is_causal=True, eps=1e-4)
        assert torch.autograd.gradcheck(call, tensors)
        assert torch.autograd.gradgradcheck(call, tensors)


def test_rows_sum_to_one_or_are_zero():
    graph = glomo.relu2_affinity(random(4, 50, 8), random(4, 50, 8), is_causal=True, diagonal=-1, eps=0.0)
    sums = graph.sum(-1)
    dead = (graph == 0).all(-1)
    assert dead[:, 0].all()
    torch.testing.assert_close(sums[~dead], torch.ones_like(sums[~dead]))


@pytest.mark.parametrize("score", [1e-6, 1e-8, 1e-9, 1e-15])
@pytest.mark.parametrize("eps", [1e-16, 1e-6, 0.0])
def test_eps_shrinks_rows_with_small_scores(score, eps):
    """The sum of a row is Z / (Z + eps), with Z a sum of squares: eps must be small against score squared."""
    query = torch.full((1, 1), score)
    graph = glomo.relu2_affinity(query, torch.ones(1, 1), eps=eps)
    assert graph.item() == pytest.approx(score**2 / (score**2 + eps), rel=1e-5)


def test_gqa_is_repeated_keys():
    query, key = random(2, 6, 5, 4), random(2, 2, 7, 4)
    graph = glomo.relu2_affinity(query, key, random(6, 1, 1), enable_gqa=True)
    assert graph.shape == (2, 6, 5, 7)
    expected = glomo.relu2_affinity(query, key.repeat_interleave(3, 1))
    torch.testing.assert_close(glomo.relu2_affinity(query, key, enable_gqa=True), expected)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_weights_rise_with_scores_and_negative_scores_are_exactly_zero(backend):
    """A leaky ReLU before the square would give the score -10 a larger weight than 0.05."""
    scores = torch.tensor([-10.0, -0.01, 0.0, 0.05, 0.5, 3.0])
    with use_backend(backend):
        graph = glomo.relu2_affinity(torch.ones(1, 1), scores[:, None])[0]
    assert (graph[:3] == 0).all()
    assert (graph[3:].diff() > 0).all()
    assert graph[3] > 0
