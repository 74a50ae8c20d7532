import math

import torch

from glomo.nn.positions import Positions, RelativeBias, sinusoids


def test_sinusoids_are_the_formula():
    table = sinusoids(50, 6)
    for t in (0, 1, 7, 49):
        for i in range(3):
            angle = t / 10000 ** (2 * i / 6)
            assert abs(float(table[t, 2 * i]) - math.sin(angle)) < 1e-6
            assert abs(float(table[t, 2 * i + 1]) - math.cos(angle)) < 1e-6


def test_an_offset_goes_on_where_the_former_units_ended():
    for kind in ("sinusoidal", "learned", "relative"):
        positions, x = Positions(kind, 9, 4), torch.randn(2, 9, 4)
        parts = torch.cat([positions(x[:, :5]), positions(x[:, 5:], 5)], 1)
        torch.testing.assert_close(parts, positions(x))
        assert torch.equal(positions(x), x) == (kind == "relative")


def test_relative_numbers_depend_on_the_clipped_distance():
    bias = RelativeBias(2, 3)
    torch.nn.init.normal_(bias.table)
    found = bias(4, 9, offset=2)
    for h in range(2):
        for t in range(4):
            for j in range(9):
                distance = max(-3, min(3, j - (t + 2)))
                assert found[h, t, j] == bias.table[distance + 3, h]
