"""Perturbations: how often, of what, the same from the same generator; never of padding."""

import math

import pytest
import torch
from torch import nn

from glomo.transfer.signal import add_noise, drop_units, embedding_noise, mask_units

UNITS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# masking


def test_masking_changes_units_alone_and_as_often_as_asked():
    units = torch.randint(1, 50, (200, 100), generator=seeded())
    units[:, 60:] = 0
    before = units.clone()
    found = mask_units(units, 0.3, replacement=99, generator=seeded())
    assert torch.equal(units, before)
    assert (found[:, 60:] == 0).all()
    changed = found != units
    assert (found[changed] == 99).all()
    assert changed[:, :60].float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert found.dtype == units.dtype


def test_masking_none_and_all():
    assert torch.equal(mask_units(UNITS, 0.0, 9, seeded()), UNITS)
    assert torch.equal(mask_units(UNITS, 1.0, 9, seeded()), (UNITS != 0) * 9)
    assert mask_units(UNITS[:0], 0.5, 9).shape == (0, 6)
    assert torch.equal(mask_units(UNITS, 1.0, 8, seeded(), padding=1), torch.where(UNITS == 1, 1, 8))
    assert mask_units(UNITS.int().view(2, 2, 6), 1.0, 8).dtype == torch.int32


# dropping


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.9, 1.0])
def test_dropping_keeps_order_and_at_least_one(probability):
    found, lengths = drop_units(UNITS, probability, seeded(1))
    for row, left, length in zip(UNITS.tolist(), found.tolist(), lengths.tolist(), strict=True):
        units = [unit for unit in row if unit]
        kept, rest = left[:length], left[length:]
        assert not any(rest)
        assert length == len([unit for unit in left if unit])
        assert bool(kept) == bool(units)
        remaining = iter(units)
        assert all(unit in remaining for unit in kept)  # a subsequence
    if probability == 0:
        assert torch.equal(found, UNITS)
    if probability == 1:
        assert lengths.tolist() == [1, 1, 0, 1]


def test_dropping_as_often_as_asked():
    units = torch.arange(1, 101).repeat(300, 1)
    found, lengths = drop_units(units, 0.25, seeded())
    assert lengths.float().mean().item() == pytest.approx(75, abs=1)
    assert len({tuple(row.tolist()) for row in found}) == 300
    # the one that is left of all is any of them
    single, _ = drop_units(units, 1.0, seeded())
    assert single[:, 0].float().mean().item() == pytest.approx(50.5, abs=6)


def test_dropping_from_nothing():
    for shape in ((0, 6), (3, 0)):
        found, lengths = drop_units(torch.zeros(shape, dtype=torch.int64), 0.5)
        assert found.shape == shape
        assert lengths.tolist() == [0] * shape[0]


# noise


def test_noise_is_normal_and_spares_what_is_masked():
    x = torch.ones(100, 50, 8)
    mask = torch.arange(50) < 30
    found = add_noise(x, 0.5, seeded(), mask.expand(100, 50))
    assert torch.equal(found[:, 30:], x[:, 30:])
    noise = found[:, :30] - 1
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(add_noise(x, 0.0), x)
    assert add_noise(x.bfloat16(), 0.5, seeded()).dtype == torch.bfloat16
    y = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    add_noise(y, 0.5, seeded()).sum().backward()
    assert (y.grad == 1).all()


def test_noise_on_an_embedding_within_the_context_alone():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Tanh())
    clean = model(UNITS)
    with embedding_noise(model[0], 0.1, seeded()):
        noisy = model(UNITS)
    expected = torch.tanh(add_noise(model[0](UNITS), 0.1, seeded(), UNITS != 0))
    assert torch.equal(noisy, expected)
    changed = (noisy != clean).any(-1)
    assert torch.equal(changed, UNITS != 0)
    assert torch.equal(model(UNITS), clean)
    with pytest.raises(RuntimeError, match="inside"), embedding_noise(model[0], 0.1):
        raise RuntimeError("inside")
    assert torch.equal(model(UNITS), clean)
    with embedding_noise(model[0], 0.1, seeded()):
        assert torch.equal(torch.tanh(model[0](input=UNITS)), expected)
    noisy.sum().backward()
    assert model[0].weight.grad.any()


def test_noise_on_vectors_of_any_input():
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    with embedding_noise(layer, 0.1, seeded()):
        noisy = layer(x)
    assert torch.equal(noisy, add_noise(layer(x), 0.1, seeded()))


# all of them


@pytest.mark.parametrize(
    "perturb",
    [
        lambda g: mask_units(UNITS, 0.5, 8, g),
        lambda g: drop_units(UNITS, 0.5, g)[0],
        lambda g: add_noise(UNITS.float(), 0.5, g),
    ],
)
def test_the_generator_decides(perturb):
    state = torch.get_rng_state()
    one, generator = perturb(seeded(3)), seeded(3)
    assert torch.equal(perturb(generator), one)
    kept = generator.get_state()
    after = perturb(generator)
    assert not torch.equal(after, one)
    restored = torch.Generator()
    restored.set_state(kept)
    assert torch.equal(perturb(restored), after)
    assert torch.equal(torch.get_rng_state(), state)  # the global one is not used


def test_mistakes():
    for probability in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"probability is {probability}; a number from 0 to 1"):
            mask_units(UNITS, probability, 9)
        with pytest.raises(ValueError, match=f"probability is {probability}"):
            drop_units(UNITS, probability)
    with pytest.raises(ValueError, match=r"units have the shape \(6,\); \(batch, units\) is needed"):
        drop_units(UNITS[0], 0.5)
    with pytest.raises(ValueError, match=r"std is -1.0; a number from 0 on"):
        add_noise(torch.zeros(2), -1.0)
    lstm = nn.LSTM(2, 2)
    with embedding_noise(lstm, 1.0), pytest.raises(TypeError, match="the module gives tuple; noise is added to one"):
        lstm(torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match=r"mask is torch.bool of shape \(3,\); a boolean one of shape \(2,\)"):
        add_noise(torch.zeros(2, 4), 1.0, mask=torch.ones(3, dtype=torch.bool))
