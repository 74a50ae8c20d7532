import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import glomo
from glomo.kernels import use_backend
from glomo.kernels.graph_mix import reference
from parity import DTYPES, EXAMPLES, IMPLEMENTATIONS, INTERPRETED, PHASES, check_parity, nudged, random, widest


@contextlib.contextmanager
def every_way(first):
    """Both ways that a backend has, whatever it would choose: running products as matrices in C++ or not, in Triton the
    sum of the graphs' tiles before the product with the features or each graph by itself, heads together or not."""
    with (
        mock.patch("glomo.kernels.cpu_mixes.as_matrices", return_value=first),
        mock.patch("glomo.kernels.triton_mixture.sums_first", return_value=first),
        mock.patch("glomo.kernels.triton_chains.PROGRAMS", 512 if first else 1),
    ):
        yield


def rounded_products(dtype):
    """Plain PyTorch rounds every product of a chain to the dtype that it computes in; so do our products with the
    features, which the reference in fp32 does not."""
    original = reference.running_products

    def products(graphs, num_heads):
        layers = graphs.unflatten(-3, (-1, num_heads)).unbind(-4)
        found = [original(torch.cat(layers[:1], -3), num_heads)]
        for layer in layers[1:]:
            found.append(nudged(layer @ found[-1], dtype))
        return torch.cat(found, -3)

    return mock.patch.object(reference, "running_products", products)


def by_loops(graphs, features, weights, chain_weights, num_heads):
    """One batch item, graphs (N, T, S), weights (T, N): matrices multiplied out, one target at a time."""
    n = graphs.shape[0]
    products = []
    for i in range(n):
        products.append(graphs[i] if i < num_heads else graphs[i] @ products[i - num_heads])
    rows = []
    for t in range(graphs.shape[1]):
        row = sum(weights[t, i] * graphs[i, t] for i in range(n))
        row = row + sum(chain_weights[t, i] * products[i][t] for i in range(n))
        rows.append(row @ features)
    return torch.stack(rows)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_heads", [1, 2, 3, 6])
def test_formula(backend, num_heads):
    tensors = random(6, 5, 5), random(5, 3), random(5, 6), random(5, 6)
    graphs, features, weights, chains = (t.to(widest(backend)) for t in tensors)
    with use_backend(backend):
        out = glomo.graph_mix(graphs, features, weights, chains, num_heads=num_heads)
    expected = by_loops(*(t.double() for t in (graphs, features, weights, chains)), num_heads)
    tolerance = 1e-4 if out.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_chain_is_a_matrix_product_not_an_elementwise_one(backend):
    """Two links of a chain: 2 reads 1, 1 reads 0. Elementwise the product would be 0."""
    graphs = torch.zeros(2, 3, 3)
    graphs[0, 1, 0] = graphs[1, 2, 1] = 1.0
    features = torch.eye(3)
    with use_backend(backend):
        out = glomo.graph_mix(graphs, features, torch.zeros(2), torch.tensor([0.0, 1.0]))
    expected = torch.zeros(3, 3)
    expected[2, 0] = 1.0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_products_of_strictly_triangular_graphs_lose_a_row_each(backend):
    graphs = torch.rand(5, 4, 4).tril(-1)
    for layers in range(1, 6):
        chain = torch.zeros(5)
        chain[layers - 1] = 1.0
        with use_backend(backend):
            product = glomo.graph_mix(graphs, torch.eye(4), torch.zeros(5), chain)
        assert (product[:layers] == 0).all()
        assert (product[layers:].abs().sum(-1) > 0).all()


WEIGHT_SHAPES = ["(N,)", "(..., N)", "(..., T, N)", "(..., 1, N)"]


def weights_of(shape, lead, t, n):
    sizes = {"(N,)": (n,), "(..., N)": (*lead, n), "(..., T, N)": (*lead, t, n), "(..., 1, N)": (*lead, 1, n)}
    return random(*sizes[shape])


@pytest.mark.parametrize("first", [True, False])
@settings(max_examples=EXAMPLES // 2, phases=PHASES)
@given(data=st.data())
def test_parity(first, data):
    with every_way(first):
        check_mixes(data)


def check_mixes(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    whole = data.draw(st.sampled_from([(), (2,), (2, 3)]))
    parts = st.sampled_from([whole, whole[1:], (1,) * len(whole), ()])
    lead_q, lead_k, lead_f = data.draw(parts), data.draw(parts), data.draw(parts)
    lead = torch.broadcast_shapes(lead_q, lead_k, lead_f)  # of the result
    lead_g = torch.broadcast_shapes(lead_q, lead_k)
    t, e = data.draw(st.sampled_from([0, 1, 2, 7, 33])), data.draw(st.sampled_from([1, 5, 16]))
    num_heads, layers = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 2, 3]))
    n = layers * num_heads
    chained = data.draw(st.booleans())
    s = t if chained else data.draw(st.sampled_from([1, 6, 40]))
    mixtures = data.draw(st.lists(st.sampled_from(WEIGHT_SHAPES), min_size=1, max_size=3))
    weights = [weights_of(shape, lead, t, n) for shape in mixtures]
    chains = [weights_of(shape, lead, t, n) for shape in mixtures] if chained else []

    def mix(graphs, features, *both):
        w, c = both[: len(weights)], both[len(weights) :] or None
        return glomo.graph_mix(graphs, features, w, c, num_heads=num_heads)

    if torch.broadcast_shapes(lead_g, lead_f) != lead:
        lead_g = lead
    tensors = [random(*lead_g, n, t, s, dtype=dtype), random(*lead_f, s, e, dtype=dtype), *weights, *chains]
    check_parity(mix, tensors, lambda: rounded_products(dtype))

    causal = data.draw(st.booleans())
    bias = data.draw(st.sampled_from([None, (), (n, 1, 1), (*lead, n, t, 1), (1, s)]))
    mask = torch.rand(*lead, 1, 1, s) > 0.3 if data.draw(st.booleans()) else None

    def relu2_mix(query, key, features, bias, *both):
        w, c = both[: len(weights)], both[len(weights) :] or None
        return glomo.relu2_graph_mix(
            query, key, features, w, c, bias, mask, num_heads=num_heads, is_causal=causal, diagonal=-1
        )

    query, key = random(*lead_q, n, t, 8, dtype=dtype), random(*lead_k, n, s, 8, dtype=dtype)
    features = random(*lead_f, s, e, dtype=dtype)
    tensors = [query, key, features, None if bias is None else random(*bias), *weights, *chains]
    check_parity(relu2_mix, tensors, lambda: rounded_products(dtype))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("diagonal", [-1, 30, None])
def test_parity_over_several_tiles(first, diagonal):
    def call(query, key, features, bias, weights, chains):
        return glomo.relu2_graph_mix(
            query,
            key,
            features,
            weights,
            chains,
            bias,
            num_heads=2,
            is_causal=diagonal is not None,
            diagonal=diagonal or 0,
        )

    n, t = 6, 80 if INTERPRETED else 150
    tensors = [random(2, n, t, 8), random(2, n, t, 8), random(2, t, 6), random(2, n, t, 1), random(2, t, n), random(n)]
    with every_way(first):
        check_parity(call, tensors)
        check_parity(lambda *a: call(*a, None), tensors[:-1])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mask_shape", [(2, 4, 40, 70), (4, 1, 70), (2, 1, 40, 70), (70,)])
def test_masks_of_all_graphs_and_of_each(first, mask_shape):
    """Whole tiles that are masked in some graphs, and rows that are masked in all."""
    mask = torch.rand(mask_shape) > 0.3
    mask[..., :64] |= torch.rand(mask.shape[:-1])[..., None] > 0.5
    mask[..., 32:50] = False

    def call(query, key, features, weights, bias):
        return glomo.relu2_graph_mix(query, key, features, weights, None, bias, mask, is_causal=True, diagonal=45)

    tensors = [random(2, 4, 40, 8), random(2, 4, 70, 8), random(2, 70, 5), random(2, 40, 4), random(4, 1, 1)]
    with every_way(first):
        check_parity(call, tensors)


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize(("batch", "size", "width"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(chained, batch, size, width):
    def call(query, key, features, *weights):
        chains = weights if chained else None
        both = glomo.relu2_graph_mix(query, key, features, weights, chains, num_heads=2)
        return *both, *glomo.graph_mix(query @ key.mT, features, weights, chains, num_heads=2)

    graphs = random(batch, 4, size, 6), random(batch, 4, size, 6)
    check_parity(call, [*graphs, random(batch, size, width), random(4), random(batch, size, 4)])


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_weights_that_are_no_numbers_spoil_their_rows_alone(backend):
    query, key, features, weights = random(4, 5, 8), random(4, 5, 8), random(5, 3), random(5, 4)
    weights[2, 1] = float("nan")
    for chains in (None, torch.zeros(4)):
        with use_backend(backend):
            out = glomo.relu2_graph_mix(query, key, features, weights, chains, num_heads=2)
        assert out[2].isnan().all()
        assert out[torch.tensor([0, 1, 3, 4])].isfinite().all()


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_features_that_all_batches_share(backend):
    features = torch.rand(2, 4).requires_grad_()
    with use_backend(backend):
        out = glomo.graph_mix(torch.ones(3, 2, 2, 2), features, torch.zeros(2), torch.tensor([0.0, 1.0]))
    (gradient,) = torch.autograd.grad(out.sum(), features)
    assert torch.equal(gradient, torch.full((2, 4), 12.0))  # three batches, two targets, two paths each


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_large_cotangents_of_several_mixtures_stay_finite(backend):
    query, key, features = (random(2, 5, 4, dtype=torch.float16).requires_grad_() for _ in range(3))
    weights = [torch.full((2,), 1.9)] * 3
    with use_backend(backend):
        outs = glomo.relu2_graph_mix(query, key, features[0] * 1e-3, weights)
    gradients = torch.autograd.grad(outs, [query, key], [torch.full_like(out, 30000.0) for out in outs])
    assert all(g.isfinite().all() for g in gradients)


def test_frozen_graphs_get_the_other_gradients():
    query, key, features = random(2, 6, 9, 4), random(2, 6, 9, 4), random(2, 9, 3).requires_grad_()
    weights = random(6).requires_grad_()
    glomo.relu2_graph_mix(query, key, features, weights, weights, num_heads=2).sum().backward()
    frozen = features.grad, weights.grad
    features.grad = weights.grad = None
    query.requires_grad_()
    glomo.relu2_graph_mix(query, key, features, weights, weights, num_heads=2).sum().backward()
    torch.testing.assert_close((features.grad, weights.grad), frozen)


def test_mixtures_share_one_call():
    query, key, features = random(2, 6, 9, 4), random(2, 6, 9, 4), random(2, 9, 3)
    weights = random(6), random(2, 9, 6)
    together = glomo.relu2_graph_mix(query, key, features, weights, num_heads=2)
    for out, w in zip(together, weights, strict=True):
        torch.testing.assert_close(out, glomo.relu2_graph_mix(query, key, features, w, num_heads=2))


def test_gradcheck_of_the_reference():
    tensors = [random(4, 3, 3), random(4, 3, 3), random(3, 2), random(4), random(3, 4), random(4, 1, 1)]
    tensors = [t.double().requires_grad_() for t in tensors]

    def call(query, key, features, weights, chains, bias):
        return glomo.relu2_graph_mix(query, key, features, weights, chains, bias, num_heads=2, eps=1e-3)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(weights=torch.ones(5)), ValueError, r"weights has shape \(5,\)"),
        (dict(weights=torch.ones(2, 3, 4, 6)), ValueError, r"weights has shape"),
        (dict(weights=(torch.ones(6), torch.ones(1))), ValueError, r"weights\[1\] has shape \(1,\)"),
        (dict(weights=()), ValueError, "empty tuple"),
        (dict(weights=torch.ones(6).long()), TypeError, "weights must be a floating-point"),
        (dict(chain_weights=torch.ones(6)), ValueError, "square graphs"),
        (dict(num_heads=4), ValueError, "num_heads is 4"),
        (dict(num_heads=2.0), TypeError, "num_heads must be a whole number"),
        (dict(weights=None), TypeError, "weights must be a tensor or a tuple"),
        (dict(graphs=torch.ones(2, 0, 5, 7), weights=torch.ones(0)), ValueError, "there are no graphs"),
        (dict(features=torch.ones(2, 4, 3)), ValueError, "features has shape"),
        (dict(features=torch.ones(3, 7, 3)), ValueError, "leading dimensions"),
        (dict(graphs=torch.ones(5, 7)), ValueError, r"graphs must be \(..., N, T, S\)"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = dict(graphs=torch.ones(2, 6, 5, 7), features=torch.ones(2, 7, 3), weights=torch.ones(6), num_heads=2)
    with pytest.raises(error, match=words):
        glomo.graph_mix(**{**arguments, **change})
