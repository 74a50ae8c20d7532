"""The Triton kernels beyond the parity tests that all backends share: the tiles they visit, the memory they touch."""

import collections
import contextlib

import pytest
import torch

import glomo
from glomo.kernels import backend, configurations, explain, triton_backward, triton_lists, use_backend
from glomo.kernels.launch import Lead
from glomo.kernels.relu2_attention import triton as attention
from parity import DEVICE, DTYPES, IMPLEMENTATIONS, check_parity, random

needs_triton = pytest.mark.skipif(
    "triton" not in IMPLEMENTATIONS, reason="needs a GPU (GLOMO_TEST_DEVICE=cuda) or TRITON_INTERPRET=1"
)
KERNELS = tuple(configurations._table("interpreter"))
SMALL: dict[str, tuple[int, int]] = {}
MIXED = dict(relu2_attention=(64, 32), targets=(32, 64), sources=(64, 128), pairs=(128, 32))


@pytest.fixture(autouse=True)
def _forced():
    with use_backend("triton"):
        yield


@pytest.fixture
def tiles(monkeypatch):
    """tiles(shapes): kernels have tiles of these (targets, sources), 32 x 32 if not named, whatever the device is."""

    def use(shapes):
        table = {}
        for kernel in KERNELS:
            m, n = shapes.get(kernel, (32, 32))
            entry = dict(width=256, weight=2, M=m, N=n, features=32, warps=4, stages=1)
            table[kernel] = collections.defaultdict(lambda entry=entry: [entry])
        monkeypatch.setattr(configurations, "_table", lambda name: table)
        forget()

    def forget():
        configurations._entry.cache_clear()
        attention._PLANS.clear()
        triton_backward._CALLS.clear()

    yield use
    monkeypatch.undo()
    forget()


@pytest.fixture
def skipping(monkeypatch):
    """Tiles without a positive score are found and remembered, however few pairs there are."""
    monkeypatch.setattr(attention, "SKIP_FROM", 0)


def gradients(call, tensors):
    """[*outputs, *gradients] of a fixed random functional of the outputs."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.manual_seed(3)
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [random(*o.shape, dtype=o.dtype) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(float(b.abs().max()), 1.0))


def in_tiles(pairs, m, n, combine):
    """combine(tile) for every m x n tile of pairs (..., T, S), as (..., tiles, tiles)."""
    rows = [torch.stack([combine(part.flatten(-2)) for part in block.split(n, -1)], -1) for block in pairs.split(m, -2)]
    return torch.stack(rows, -2)


# --- Which tiles are visited


@needs_triton
@pytest.mark.parametrize(("m", "n"), [(32, 32), (64, 128)])
@pytest.mark.parametrize("diagonal", [None, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_active_blocks_are_those_with_a_positive_score(tiles, skipping, m, n, diagonal, masked):
    tiles(dict(relu2_attention=(m, n)))
    query, key, value, bias = random(1, 100, 4), random(1, 130, 4), random(1, 130, 3), random(100, 130)
    bias[32:64, 32:96] = bias[:32, 96:] = -1000.0
    bias[64:96, :64] = 1000.0
    mask = None
    if masked:
        mask = torch.rand(100, 130) > 0.2
        mask[64:, 64:96] = False
        mask[64:96, :64] = True
    arguments = (query, key, value, bias, mask, None, 0.0, diagonal, 1.0, 1e-6)
    active = attention.relu2_attention_forward(*arguments)[2]
    allowed = torch.ones(100, 130, dtype=torch.bool) if mask is None else mask
    allowed = allowed if diagonal is None else allowed.tril(diagonal)
    positive = in_tiles((query @ key.mT + bias > 0) & allowed, m, n, lambda t: t.any(-1))
    whole = in_tiles(allowed, m, n, lambda t: t.all(-1) & (t.size(-1) % n == 0))
    for i, j in [(i, j) for i in range(positive.size(-2)) for j in range(positive.size(-1))]:
        block = active[:, i * m // 32 : (i + 1) * m // 32, j * n // 32 : (j + 1) * n // 32].flatten(1)
        assert torch.equal(block > 0, positive[:, i, j, None].expand_as(block)), (i, j)
        assert whole[i, j] or (block < 2).all(), (i, j)
        if whole[i, j] and (i + 1) * m <= 100 and positive[:, i, j].all() and (j + 1) * n <= 130:
            assert (block == 2).all(), (i, j)


@needs_triton
@pytest.mark.parametrize("shapes", [SMALL, MIXED])
@pytest.mark.parametrize("bias_shape", [(100, 1), (100,), (100, 100)])
def test_skipped_tiles_change_nothing(tiles, skipping, monkeypatch, shapes, bias_shape):
    """Whole runs of targets or sources are dead, and every kernel has its own tiles."""
    tiles(shapes)
    bias = random(*bias_shape)
    if bias_shape[-2:-1] == (100,):
        bias[..., 64:90, :] = -1000.0
    if bias_shape[-1:] == (100,):
        bias[..., 32:96] = -1000.0

    def call(query, key, value, bias):
        return glomo.relu2_attention(query, key, value, bias, is_causal=True, diagonal=20, return_normalizer=True)

    tensors = [random(100, 8), random(100, 8), random(100, 5), bias]
    found = gradients(call, tensors)
    monkeypatch.setattr(attention, "SKIP_FROM", 1 << 40)
    close(found, gradients(call, tensors))
    with use_backend("reference"):
        close(found, gradients(call, tensors))


@needs_triton
@pytest.mark.parametrize("why", ["mask", "diagonal", "bias"])
def test_empty_tiles_are_not_read(tiles, skipping, why):
    """NaN lies where nobody may look: in the values of empty tiles, and in the keys where these need not be known."""
    tiles(SMALL)
    query, key, value, bias = random(70, 8), random(100, 8), random(100, 40), torch.zeros(100)
    mask, options = None, {}
    value[32:64] = float("nan")
    if why == "bias":
        bias[32:64] = -1000.0
    else:
        key[32:64] = float("nan")
        if why == "mask":
            mask = torch.ones(70, 100, dtype=torch.bool)
            mask[:, 32:64] = False
        else:
            query, options = query[:32], dict(is_causal=True, diagonal=0)

    def call(query, key, value, bias):
        return glomo.relu2_attention(query, key, value, bias, mask, return_normalizer=True, **options)

    results = gradients(call, [query, key, value, bias])
    assert all(t.isfinite().all() for t in results)
    assert results[0].abs().max() > 0
    for gradient in results[3:]:
        assert (gradient[32:64] == 0).all()


@needs_triton
@pytest.mark.parametrize("owned", [(1, 2)])
@pytest.mark.parametrize(("num_targets", "num_sources"), [(70, 130), (128, 64), (1, 150)])
def test_tile_lists_against_brute_force(owned, num_targets, num_sources):
    """Each nonempty tile once, in order, and as whole only where every pair is allowed; for both directions."""
    mask = torch.rand(*owned, num_targets, num_sources) > 0.002
    mask[..., 32:64, :64] = False
    mask[..., :, 96:140] = False
    mask[0, 0, :, 64:] = False
    lead = Lead(torch.Size((2, 2)), [(mask, 2), (torch.empty(2, 2, num_targets, 4), 2)])
    for diagonal in (None, 35):
        allowed = mask if diagonal is None else mask.tril(diagonal)
        states = triton_lists.mask_states(lead, mask, num_targets, num_sources, diagonal)
        for m, n in [(32, 32), (64, 128)]:
            for swapped in (False, True):
                if swapped:
                    sizes, source, pairs = (num_sources, num_targets, n, m), triton_lists.transposed(states), allowed.mT
                else:
                    sizes, source, pairs = (num_targets, num_sources, m, n), states, allowed
                lists = triton_lists.tile_lists(source, *sizes).pointer.flatten(0, -3)
                pairs = pairs.flatten(0, -3)
                some = in_tiles(pairs, *sizes[2:], lambda t: t.any(-1))
                # what is beyond the last target is harmless, and what is beyond the last source is not
                full = in_tiles(pairs, *sizes[2:], lambda t: t.all(-1))
                inside = torch.arange(1, full.size(-2 if swapped else -1) + 1) * n <= num_sources
                full = full & (inside[:, None] if swapped else inside)
                assert lists.shape[:2] == some.shape[:2]
                for batch, tile in [(b, i) for b in range(lists.size(0)) for i in range(lists.size(1))]:
                    num_whole, visited, *numbers = lists[batch, tile].tolist()
                    whole, mixed = numbers[:num_whole], numbers[num_whole:visited]
                    assert whole == sorted(whole)
                    assert mixed == sorted(mixed)
                    assert sorted(whole + mixed) == some[batch, tile].nonzero().flatten().tolist()
                    assert set(whole) <= set(full[batch, tile].nonzero().flatten().tolist())
                    if num_targets % m == 0:
                        assert whole == full[batch, tile].nonzero().flatten().tolist()


@needs_triton
@pytest.mark.parametrize(
    ("op", "shape"),
    [("relu2_attention", shape) for shape in [(), (100,), (70, 1), (70, 100), (2, 1, 100), (2, 1, 1)]]
    + [("relu2_affinity", shape) for shape in [(100,), (70, 1), (2, 70, 100)]],
)
def test_masks_of_every_kind_over_several_tiles(tiles, op, shape):
    tiles(SMALL)
    mask = torch.rand(shape) > 0.3
    if shape == ():
        mask = torch.tensor(True)
    if shape[-1:] == (100,):
        mask[..., 32:64] = False
        mask[..., 64:96] = True
    if shape[-2:-1] == (70,):
        mask[..., :32, :] = True
        mask[..., 40, :] = False

    def call(query, key, *rest):
        return getattr(glomo, op)(query, key, *rest, None, mask, is_causal=True, diagonal=50)

    tensors = [random(2, 70, 8), random(100, 8), random(100, 5)]
    check_parity(call, tensors if op == "relu2_attention" else tensors[:2])


# --- Shapes, offsets and numbers at the edges


@needs_triton
@pytest.mark.parametrize("op", ["relu2_attention", "relu2_affinity"])
def test_more_than_three_leading_dimensions(op):
    """They do not collapse to three where tensors broadcast or are permuted, the cotangents included."""
    mask = torch.rand(2, 1, 2, 3, 5) > 0.2
    tensors = [random(2, 2, 2, 2, 3, 4), random(2, 1, 2, 5, 4), random(2, 1, 2, 1, 5, 3), random(2, 1, 1, 3, 5)]
    weights, others, swap = random(2, 2, 2, 2, 3), random(2, 2, 2, 2, 3, 3), (3, 2, 1, 0)

    def call(query, key, value, bias):
        query = query.permute(*swap, 4, 5).contiguous().permute(*swap, 4, 5)
        if op == "relu2_affinity":
            return glomo.relu2_affinity(query, key, bias, mask).permute(*swap, 4, 5)[..., :3] * others
        out, z = glomo.relu2_attention(query, key, value, bias, mask, return_normalizer=True)
        return (out.permute(*swap, 4, 5) * others).sum() + (z.permute(*swap, 4) * weights).sum()

    check_parity(call, tensors)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "features"), [(16, 100), (40, 300), (256, 5), (0, 5), (5, 0)])
def test_wide_queries_and_values(dtype, width, features):
    def call(query, key, value, bias):
        return glomo.relu2_attention(query, key, value, bias, scale=0.2, dropout_p=0.3, return_normalizer=True)

    tensors = [random(20, width, dtype=dtype), random(33, width, dtype=dtype), random(33, features, dtype=dtype)]
    check_parity(call, [*tensors, random(33)])


@needs_triton
def test_a_very_wide_value():
    check_parity(glomo.relu2_attention, [random(2, 4), random(3, 4), random(3, 1024)])


@needs_triton
@pytest.mark.parametrize("diagonal", [2**31 - 1, 2**63 - 1, -(2**63)])
def test_diagonals_far_outside(diagonal):
    query, key, mask = random(40, 8), random(70, 8), torch.rand(40, 70) > 0.3

    def call(query, key, **options):
        out = glomo.relu2_attention(query, key, key, attn_mask=mask, **options)
        return out, glomo.relu2_affinity(query, key, **options)

    found = gradients(lambda q, k: call(q, k, is_causal=True, diagonal=diagonal), [query, key])
    expected = gradients(call, [query, key])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b if diagonal > 0 else torch.zeros_like(b), rtol=1e-4, atol=1e-4)


SHAPES = dict(query=(3, 4), key=(35, 4), value=(35, 70), bias=(3, 35), mask=(3, 35), dout=(3, 70), dz=(3,))


def far_apart(t, dim):
    """The same numbers, but the last seventh of a dimension begins 2^31 elements behind its first ones."""
    step = 2**31 // (t.size(dim) * 6 // 7) + 1
    strides = [1] * t.dim()
    strides[dim] = step
    storage = torch.empty(step * (t.size(dim) - 1) + max(t.shape), dtype=t.dtype)  # few of its pages are ever touched
    return storage.as_strided(t.shape, strides).copy_(t)


@needs_triton
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


@needs_triton
@pytest.mark.skipif(DEVICE != "cpu", reason="gigabytes, which only virtual memory gives for nothing")
def test_packed_bias_beyond_32_bits():
    cu, query, bias = torch.tensor([0, 37, 40]), random(40, 1, 4), random(1, 40, 1)
    results = [
        gradients(lambda q, b: glomo.relu2_attention_varlen(q, q, q, cu, cu, 37, 37, b), [query, b])
        for b in (bias, far_apart(bias, 1))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_triton
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

    found = gradients(call, tensors)
    with use_backend("reference"):
        expected = gradients(call, tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- Memory: nothing uninitialised is read, nothing outside is written


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
        return first, z, second, glomo.relu2_affinity(query, key, row_bias.mT[..., :35], mask, enable_gqa=True)

    shapes = [(2, 40, 20), (1, 35, 20), (1, 35, 40), (40, 35), (2, 40, 1)]
    return call, [random(*shape, dtype=torch.float16) for shape in shapes]


def everything_packed():
    cu_q, cu_k = torch.tensor([0, 3, 3, 37]), torch.tensor([0, 1, 2, 35])

    def call(query, key, value, bias, source_bias):
        arguments = (query, key, value, cu_q, cu_k, 40, 40)
        options = dict(is_causal=True, diagonal=3, enable_gqa=True, return_normalizer=True)
        first = glomo.relu2_attention_varlen(*arguments, bias, dropout_p=0.2, **options)
        return *first, *glomo.relu2_attention_varlen(*arguments, source_bias, **options)

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


@needs_triton
@pytest.mark.parametrize("make", [everything, everything_packed])
def test_same_bits_whatever_other_memory_holds(skipping, make):
    """Again with poisoned fresh memory, then with inputs inside of NaN and outputs between guards."""
    call, tensors = make()
    expected = gradients(call, tensors)
    with deterministic():
        poisoned = gradients(call, tensors)
    views, storages = zip(*(inside_nan(t) for t in tensors), strict=True)
    before = [s.clone() for s in storages]
    with pytest.MonkeyPatch.context() as patch:
        guards = Guards(patch)
        guarded = gradients(call, views)
    guards.check()
    for a, b, c in zip(expected, poisoned, guarded, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for a, b in zip(storages, before, strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))


@needs_triton
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
        guards.check()
        assert all(t.isfinite().all() for t in (out, z, *results))


# --- The choice of a configuration and of the backend


def test_every_configuration_file_is_whole():
    folder = configurations.resources.files(configurations.__package__) / "tuned"
    names = sorted(f.name for f in folder.iterdir())
    assert {"default.json", "interpreter.json"} <= set(names)
    for name in names:
        table = configurations._table(name.removesuffix(".json"))
        assert set(table) == set(KERNELS), name
        for kernel, by_products in table.items():
            assert {"float32", "float16", "bfloat16"} <= set(by_products), (name, kernel)
            for products, entries in by_products.items():
                widths = [e["width"] for e in entries]
                assert widths, (name, kernel, products)
                assert widths == sorted(widths), (name, kernel, products)
                for e in entries:
                    assert {e["M"], e["N"]} <= {32, 64, 96, 128}, (name, kernel, e)
                    assert max(e["M"], e["N"]) <= triton_lists.LARGEST_TILE
                    assert e["features"] in (16, 32, 64, 128, 256), (name, kernel, e)
                    assert e["warps"] in (1, 2, 4, 8, 16), (name, kernel, e)
                    assert 1 <= e["stages"] <= 8, (name, kernel, e)


def test_an_unknown_architecture_has_the_default_configuration():
    assert configurations._table("sm_999") == configurations._table("default")
    assert configurations._table("sm_999") != configurations._table("interpreter")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_configuration_for_every_width(kernel):
    for width in (0, 1, 16, 17, 64, 100, 256):
        for features in (0, 1, 64, 100, 1024):
            for weight in (0, 1, 2):
                tile = configurations.configuration(kernel, torch.empty(1, width), features, weight)
                assert tile.features & (tile.features - 1) == 0
                assert tile.features <= max(16, 2 * features)


@pytest.mark.skipif(DEVICE != "cpu", reason="asks about tensors on the CPU")
def test_forcing_triton_says_what_is_missing(monkeypatch):
    query = random(2, 3, 4)
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    with pytest.raises(ValueError, match="use_backend forces the backend 'triton', but the Triton kernels need a GPU"):
        glomo.relu2_attention(query, query, query)
    assert "raises, because use_backend forces 'triton'" in explain("relu2_attention", query)
    monkeypatch.setattr(backend, "_INTERPRETED", True)
    assert explain("relu2_attention", query) == "relu2_attention runs on 'triton', because use_backend forces it."
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        glomo.relu2_attention(*[query.bfloat16()] * 3)
    with pytest.raises(ValueError, match=r"float32, float16 and bfloat16, not in torch\.float64"):
        glomo.relu2_affinity(query.double(), query.double())
    with pytest.raises(ValueError, match="the query has 257 columns, and the Triton kernels take 256 at most"):
        glomo.relu2_affinity(random(3, 257), random(3, 257))
    monkeypatch.setattr(backend, "_TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        glomo.relu2_attention(query, query, query)
