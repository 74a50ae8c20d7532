import pytest
import torch

from glomo.kernels.philox import keep_mask, philox4x32


def words(*values):
    return tuple(torch.tensor(v) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers of the Random123 library
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    seed = key[0] | (key[1] << 32)
    seed = seed - 2**64 if seed >= 2**63 else seed
    assert tuple(w.item() for w in philox4x32(words(*counter), torch.tensor(seed))) == expected


def test_mask_does_not_depend_on_the_tile():
    seed, n = torch.tensor(123456789012), torch.arange(6)
    whole = keep_mask(seed, 0.3, n, range(20), 37)
    assert torch.equal(keep_mask(seed, 0.3, n[2:5], range(7, 13), 37), whole[2:5, 7:13])
    assert torch.equal(keep_mask(seed, 0.3, n.view(2, 3), range(20), 11), whole.view(2, 3, 20, 37)[..., :11])


def test_rate_and_independence():
    keep = keep_mask(torch.tensor(7), 0.25, torch.arange(16), range(64), 64).float()
    assert abs(keep.mean().item() - 0.75) < 0.01
    other = keep_mask(torch.tensor(8), 0.25, torch.arange(16), range(64), 64).float()
    assert abs((keep * other).mean().item() - 0.75**2) < 0.01
    assert abs((keep[:, :-1] * keep[:, 1:]).mean().item() - 0.75**2) < 0.01


@pytest.mark.parametrize(("p", "expected"), [(0.0, True), (1.0, False)])
def test_extremes(p, expected):
    assert (keep_mask(torch.tensor(7), p, torch.arange(2), range(9), 9) == expected).all()
