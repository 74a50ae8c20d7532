"""Nothing uninitialised is read, nothing outside is written."""

import contextlib
from unittest import mock

import pytest
import torch

import glomo
from glomo.kernels.attention import triton as softmax_attention
from glomo.kernels.relu2_attention import triton as attention
from glomo.nn import FrozenGraph, GLoMo, GLoMoConfig, GraphTransfer
from parity import LargestTensor, needs_triton, random, run

pytestmark = needs_triton


def everything():
    """One call that uses all kernels and all their checks, as (call, tensors): sizes are no multiple of anything."""
    mask = torch.rand(40, 35) > 0.3
    mask[32:, :32] = False

    def call(query, key, value, bias, row_bias):
        first, z = glomo.relu2_attention(
            query, key, value, bias, mask, is_causal=True, diagonal=10, dropout_p=0.2, enable_gqa=True,
            return_normalizer=True,
        )  # fmt: skip
        second = glomo.relu2_attention(query, key, value[..., :20], row_bias, enable_gqa=True)
        third, lse = glomo.attention(query, key, value, bias, 0.2, enable_gqa=True, return_lse=True)
        fourth = glomo.attention(query, key, value[..., :20], mask, enable_gqa=True)
        return (
            first,
            z,
            second,
            third,
            lse,
            fourth,
            glomo.relu2_affinity(query, key, row_bias.mT[..., :35], mask, enable_gqa=True),
        )

    shapes = [(2, 40, 20), (1, 35, 20), (1, 35, 40), (40, 35), (2, 40, 1)]
    return call, [random(*shape, dtype=torch.float16) for shape in shapes]


def every_mix():
    """Both ways to a mixture, two mixtures in a launch and one, chains, given graphs, every kind of mask."""
    masks = torch.rand(1, 40, 40) > 0.3, torch.rand(4, 40, 40) > 0.3

    def call(query, key, features, bias, *weights):
        options = dict(num_heads=2, is_causal=True, diagonal=3)
        found = list(glomo.relu2_graph_mix(query, key, features, weights, weights, bias, masks[0], **options))
        for first in (True, False):
            with mock.patch("glomo.kernels.triton_mixture.sums_first", return_value=first):
                found += glomo.relu2_graph_mix(query, key, features, weights[:1], None, bias[..., :1], masks[1])
        graphs = (query @ key.mT).softmax(-1)
        return *found, *glomo.graph_mix(graphs, features, weights, weights, num_heads=2)

    shapes = [(4, 40, 20), (4, 40, 20), (40, 35), (4, 40, 40), (40, 4), (4,), (40, 4)]
    return call, [random(*shape, dtype=torch.float16) for shape in shapes]


def everything_packed():
    cu_q, cu_k = torch.tensor([0, 3, 3, 37]), torch.tensor([0, 1, 2, 35])

    def call(query, key, value, bias, source_bias):
        arguments = (query, key, value, cu_q, cu_k, 40, 40)
        options = dict(is_causal=True, diagonal=3, enable_gqa=True, return_normalizer=True)
        first = glomo.relu2_attention_varlen(*arguments, bias, dropout_p=0.2, **options)
        second = glomo.relu2_attention_varlen(*arguments, source_bias, **options)
        options = dict(is_causal=True, enable_gqa=True, return_lse=True)
        return *first, *second, *glomo.attention_varlen(*arguments, dropout_p=0.2, **options)

    shapes = [(37, 2, 20), (35, 1, 20), (35, 1, 40), (37, 2), (1, 35, 2)]
    return call, [random(*shape, dtype=torch.float16) for shape in shapes]


@contextlib.contextmanager
def deterministic():
    """PyTorch fills fresh memory with NaN, or the largest integer, in this mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Guards:
    """Fresh tensors of PyTorch, each in the middle of a larger one whose other elements must stay as they are."""

    MARGIN = 512
    SENTINEL = 77

    def __init__(self, patch):
        self.storages = []
        for owner, name in [(torch, "empty"), (torch, "zeros"), (torch.Tensor, "new_empty")]:
            patch.setattr(owner, name, self._guarded(getattr(owner, name)))

    def _guarded(self, allocate):
        def replacement(*arguments, **options):
            plain = allocate(*arguments, **options)
            if plain.numel() == 0:
                return plain
            storage = torch.full((plain.numel() + 2 * self.MARGIN,), self.SENTINEL, dtype=plain.dtype)
            self.storages.append(storage)
            return storage[self.MARGIN : self.MARGIN + plain.numel()].zero_().view(plain.shape)

        return replacement

    def check(self):
        assert self.storages
        for storage in self.storages:
            assert (storage[: self.MARGIN] == self.SENTINEL).all()
            assert (storage[storage.numel() - self.MARGIN :] == self.SENTINEL).all()


def inside_nan(t):
    """A view of t's numbers, strided and surrounded by NaN (or by True), and what it is a view of."""
    whole = torch.full([n + 64 for n in t.shape], float("nan") if t.is_floating_point() else True, dtype=t.dtype)
    return whole[tuple(slice(32, 32 + n) for n in t.shape)].copy_(t), whole


@pytest.mark.parametrize("make", [everything, every_mix, everything_packed])
def test_same_bits_whatever_other_memory_holds(skipping, make):
    """Again with poisoned fresh memory, then with inputs inside of NaN and outputs between guards."""
    call, tensors = make()
    expected = run(call, tensors)
    with deterministic():
        poisoned = run(call, tensors)
    views, storages = zip(*(inside_nan(t) for t in tensors), strict=True)
    before = [s.clone() for s in storages]
    with pytest.MonkeyPatch.context() as patch:
        guards = Guards(patch)
        guarded = run(call, views)
    guards.check()
    for a, b, c in zip(expected, poisoned, guarded, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for a, b in zip(storages, before, strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))


def test_glomo_holds_no_graph():
    """Pre-training and transfer, forward and backward: no tensor as large as one graph."""
    size = 112
    config = GLoMoConfig(
        vocab_size=9, dim=8, layers=2, heads=2, head_dim=4, conv_blocks=1, decoder_layers=1, positions=2
    )
    model, tokens, lengths = GLoMo(config), torch.randint(2, 9, (1, size)), torch.tensor([size])
    graph = FrozenGraph(model.graph_predictor, range(9))
    transfer = GraphTransfer(graph, 5, weights="target")
    with LargestTensor() as seen:
        model(tokens, lengths).backward()
        transfer(random(1, size, 5), lengths, graph.queries_keys(tokens, lengths)).sum().backward()
    assert 0 < seen.largest < size * size


@pytest.mark.parametrize(
    "boundaries",
    [
        [0, 35, 10, 40],
        [0, 20, 41, 10**6],
        [-40, 10, 30, 40],
        [20, 30, 10, 0],
        [2**40, -(2**40), 2**31, -(2**31)],
        [5, 5, 5, 5],
    ],
)
def test_wrong_boundaries_touch_nothing_outside(boundaries):
    """On a GPU nobody reads them first. What the results are then is open, but they come from these tensors."""
    tensors = [random(40, 1, 20), random(40, 1, 20), random(40, 1, 20), random(40, 1, 1)]
    views = [inside_nan(t)[0] for t in tensors]
    wrong, right = torch.tensor(boundaries), torch.tensor([0, 15, 30, 40])
    for cu_q, cu_k in [(wrong, right), (right, wrong)]:
        rest = (None, 0.0, -1, 1.0, 1e-6)
        with pytest.MonkeyPatch.context() as patch:
            guards = Guards(patch)
            out, z = attention.relu2_attention_varlen_forward(*views[:3], cu_q, cu_k, views[3], *rest)
            results = attention.relu2_attention_varlen_backward(
                [random(*out.shape), random(*z.shape)], [out, z], *views[:3], cu_q, cu_k, views[3], *rest,
                needs=[True] * 4,
            )  # fmt: skip
            rest = (None, 0.0, 0, 1.0)
            more = softmax_attention.attention_varlen_forward(*views[:3], cu_q, cu_k, *rest)
            results += softmax_attention.attention_varlen_backward(
                [random(*out.shape), random(*z.shape)], list(more), *views[:3], cu_q, cu_k, *rest, needs=[True] * 3
            )
        guards.check()
        assert all(t.isfinite().all() for t in (out, z, *results))
