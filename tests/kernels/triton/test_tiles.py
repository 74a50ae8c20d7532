"""Which tiles the kernels visit."""

import pytest
import torch

import glomo
from glomo.kernels import triton_lists, use_backend
from glomo.kernels.launch import Lead
from glomo.kernels.relu2_attention import triton as attention
from parity import check_parity, needs_triton, random, run

pytestmark = needs_triton

SMALL: dict[str, tuple[int, int]] = {}
MIXED = dict(relu2_attention=(64, 32), targets=(32, 64), sources=(64, 128), pairs=(128, 32))


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(float(b.abs().max()), 1.0))


def in_tiles(pairs, m, n, combine):
    """combine(tile) for every m x n tile of pairs (..., T, S), as (..., tiles, tiles)."""
    rows = [torch.stack([combine(part.flatten(-2)) for part in block.split(n, -1)], -1) for block in pairs.split(m, -2)]
    return torch.stack(rows, -2)


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
    found = run(call, tensors)
    monkeypatch.setattr(attention, "SKIP_FROM", 1 << 40)
    close(found, run(call, tensors))
    with use_backend("reference"):
        close(found, run(call, tensors))


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

    results = run(call, [query, key, value, bias])
    assert all(t.isfinite().all() for t in results)
    assert results[0].abs().max() > 0
    for gradient in results[3:]:
        assert (gradient[32:64] == 0).all()


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
