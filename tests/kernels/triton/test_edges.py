"""Shapes, offsets and numbers at the edges."""

import pytest
import torch

import glomo
from parity import DEVICE, DTYPES, check_parity, far_apart, needs_triton, random, run

pytestmark = needs_triton


@pytest.mark.parametrize("op", ["relu2_attention", "relu2_affinity", "attention", "relu2_graph_mix"])
def test_more_than_three_leading_dimensions(op):
    """They do not collapse to three where tensors broadcast or are permuted, the cotangents included."""
    mask = torch.rand(2, 1, 2, 3, 5) > 0.2
    tensors = [random(2, 2, 2, 2, 3, 4), random(2, 1, 2, 5, 4), random(2, 1, 2, 1, 5, 3), random(2, 1, 1, 3, 5)]
    weights, others, swap = random(2, 2, 2, 2, 3), random(2, 2, 2, 2, 3, 3), (3, 2, 1, 0)

    def call(query, key, value, bias):
        query = query.permute(*swap, 4, 5).contiguous().permute(*swap, 4, 5)
        if op == "relu2_affinity":
            return glomo.relu2_affinity(query, key, bias, mask).permute(*swap, 4, 5)[..., :3] * others
        if op == "relu2_graph_mix":
            mixed = glomo.relu2_graph_mix(query, key, value[:, :, 0], torch.ones(2, 1, 1, 2), None, bias, mask)
            return mixed.permute(2, 1, 0, 3, 4) * others[:, 0]
        if op == "attention":
            out, z = glomo.attention(query, key, value, bias, return_lse=True)
        else:
            out, z = glomo.relu2_attention(query, key, value, bias, mask, return_normalizer=True)
        return (out.permute(*swap, 4, 5) * others).sum() + (z.permute(*swap, 4) * weights).sum()

    check_parity(call, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "features"), [(16, 100), (40, 300), (256, 5), (0, 5), (5, 0)])
def test_wide_queries_and_values(dtype, width, features):
    def call(query, key, value, bias):
        return glomo.relu2_attention(query, key, value, bias, scale=0.2, dropout_p=0.3, return_normalizer=True)

    tensors = [random(20, width, dtype=dtype), random(33, width, dtype=dtype), random(33, features, dtype=dtype)]
    check_parity(call, [*tensors, random(33)])


def test_a_very_wide_value():
    check_parity(glomo.relu2_attention, [random(2, 4), random(3, 4), random(3, 1024)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "features"), [(40, 300), (256, 5), (0, 5), (5, 0)])
def test_wide_queries_and_values_of_attention(dtype, width, features):
    def call(query, key, value, mask):
        return glomo.attention(query, key, value, mask, 0.3, return_lse=True)

    tensors = [random(20, width, dtype=dtype), random(33, width, dtype=dtype), random(33, features, dtype=dtype)]
    check_parity(call, [*tensors, random(33)])


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize(("width", "features"), [(40, 300), (256, 5), (0, 5), (5, 0)])
def test_wide_queries_and_features_of_mixtures(width, features, chained):
    def call(query, key, features, *weights):
        return glomo.relu2_graph_mix(query, key, features, weights, weights if chained else None, num_heads=2)

    query, key = random(4, 33, width), random(4, 33, width)
    check_parity(call, [query * 0.3, key, random(33, features), random(4), random(33, 4)])


@pytest.mark.parametrize("diagonal", [2**31 - 1, 2**63 - 1, -(2**63)])
def test_diagonals_far_outside(diagonal):
    query, key, mask = random(40, 8), random(70, 8), torch.rand(40, 70) > 0.3

    def call(query, key, **options):
        out = glomo.relu2_attention(query, key, key, attn_mask=mask, **options)
        return out, glomo.relu2_affinity(query, key, **options)

    found = run(lambda q, k: call(q, k, is_causal=True, diagonal=diagonal), [query, key])
    expected = run(call, [query, key])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b if diagonal > 0 else torch.zeros_like(b), rtol=1e-4, atol=1e-4)


SHAPES = dict(query=(3, 4), key=(35, 4), value=(35, 70), bias=(3, 35), mask=(3, 35), dout=(3, 70), dz=(3,))


@pytest.mark.skipif(DEVICE != "cpu", reason="gigabytes, which only virtual memory gives for nothing")
@pytest.mark.parametrize("name_dim", [f"{name} {dim}" for name, shape in SHAPES.items() for dim in range(len(shape))])
def test_offsets_beyond_32_bits(name_dim):
    name, dim = name_dim.split()
    values = {n: random(*shape, dtype=torch.float16) for n, shape in SHAPES.items()}
    values |= dict(mask=torch.rand(3, 35) > 0.3, dz=random(3))

    def results(query, key, value, bias, mask, dout, dz):
        leaves = [t.detach().requires_grad_() for t in (query, key, value, bias)]
        out, z = glomo.relu2_attention(*leaves, mask, return_normalizer=True)
        return [out.detach(), z.detach(), *torch.autograd.grad([out, z], leaves, [dout, dz])]

    expected = results(**values)
    found = results(**values | {name: far_apart(values[name], int(dim))})
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE != "cpu", reason="gigabytes, which only virtual memory gives for nothing")
def test_packed_bias_beyond_32_bits():
    cu, query, bias = torch.tensor([0, 37, 40]), random(40, 1, 4), random(1, 40, 1)
    results = [
        run(lambda q, b: glomo.relu2_attention_varlen(q, q, q, cu, cu, 37, 37, b), [query, b])
        for b in (bias, far_apart(bias, 1))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_more_sequences_than_are_searched_at_once():
    """Most are empty; a search step looks at 256 boundaries."""
    torch.manual_seed(1)
    lengths_q, lengths_k = torch.zeros(300, dtype=torch.int64), torch.zeros(300, dtype=torch.int64)
    lengths_q[torch.tensor([0, 1, 255, 256, 257, 299])] = torch.tensor([3, 33, 1, 2, 40, 4])
    lengths_k[torch.tensor([0, 2, 255, 257, 299])] = torch.tensor([4, 5, 2, 33, 6])
    cu_q, cu_k = (torch.cat([n.new_zeros(1), n.cumsum(0)]) for n in (lengths_q, lengths_k))
    tensors = [random(int(cu_q[-1]), 1, 4), random(int(cu_k[-1]), 1, 4), random(int(cu_k[-1]), 1, 3)]

    def call(query, key, value):
        return glomo.relu2_attention_varlen(query, key, value, cu_q, cu_k, 40, 35, dropout_p=0.3)

    found = run(call, tensors)
    expected = run(call, tensors, "reference")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
