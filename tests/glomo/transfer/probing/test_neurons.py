"""Units and labels against numpy, and information counted cell by cell."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from glomo.transfer.probing import mutual_information, top_examples, top_units, unit_correlations


def data(rows=41, dim=5):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, dim, generator=generator), torch.randint(3, (rows,), generator=generator)
    x[:, 2] = x[:, 2] / 5 + (y == 1)
    x[:, 3] = 0.1
    x[:, 4] = (x[:, 4] * 2).round()
    return x, y


def test_point_biserial_by_its_own_formula():
    """(mean of ones - mean of zeros) / std * sqrt(p q)."""
    x, y = data()
    found = unit_correlations(x, y == 1)
    a, b = x.double().numpy(), (y == 1).numpy()
    p = b.mean()
    for unit in (0, 1, 2, 4):
        expected = (a[b, unit].mean() - a[~b, unit].mean()) / a[:, unit].std() * math.sqrt(p * (1 - p))
        assert float(found[unit]) == pytest.approx(expected)
    assert float(found[3]) == 0
    assert found.dtype == torch.float64


def test_spearman_of_a_monotonous_unit():
    x = torch.tensor([[1.0, 3.0], [2.0, 2.0], [300.0, 2.0], [4000.0, 1.0]])
    found = unit_correlations(x, torch.tensor([0.1, 0.2, 0.3, 9.0]), "spearman")
    assert float(found[0]) == pytest.approx(1)
    ranks = np.corrcoef([4.0, 2.5, 2.5, 1.0], [1, 2, 3, 4])[0, 1]
    assert float(found[1]) == pytest.approx(ranks)


def test_top_units_and_examples():
    x, y = data()
    found = unit_correlations(x, y == 1)
    assert top_units(found, 1) == [(2, float(found[2]))]
    assert top_units(torch.tensor([0.5, -0.9, 0.5, 0.0]), 3) == [(1, pytest.approx(-0.9)), (0, 0.5), (2, 0.5)]
    assert len(top_units(found, 99)) == 5
    assert top_units(found, 0) == []
    values = torch.tensor([[0.0, 7.0], [1.0, 9.0], [2.0, 9.0]])
    assert top_examples(values, 1, 2) == [(1, 9.0), (2, 9.0)]


@pytest.mark.parametrize("bins", [1, 2, 4, 8])
def test_information_counted_cell_by_cell(bins):
    x, y = data()
    found = mutual_information(x, y, bins)
    for unit in range(5):
        column = x[:, unit].tolist()
        ranks = [sum(b < a for b in column) + (sum(b == a for b in column) + 1) / 2 for a in column]
        place = [min(bins - 1, max(0, math.ceil(r * bins / len(column)) - 1)) for r in ranks]
        cells = Counter(zip(place, y.tolist(), strict=True))
        of_bin, of_class = Counter(place), Counter(y.tolist())
        expected = sum(n / 41 * math.log(n / 41 / (of_bin[b] / 41 * of_class[c] / 41)) for (b, c), n in cells.items())
        assert float(found[unit]) == pytest.approx(expected, abs=1e-12)


def test_information_sees_what_correlation_does_not():
    x = torch.linspace(-1, 1, 400)[:, None]
    y = (x[:, 0].abs() > 0.5).long()
    assert abs(float(unit_correlations(x, y)[0])) < 1e-6
    assert float(mutual_information(x, y, 8)[0]) == pytest.approx(math.log(2), abs=0.02)


def test_mistakes():
    x, y = data()
    with pytest.raises(ValueError, match=r"x is \(41, 5\) and y \(3,\)"):
        unit_correlations(x, y[:3])
    with pytest.raises(ValueError, match="method is 'kendall'"):
        unit_correlations(x, y, "kendall")
    with pytest.raises(ValueError, match=r"unit is 5 and count 10 for features \(41, 5\)"):
        top_examples(x, 5)
    with pytest.raises(ValueError, match=r"the correlations are \(2, 2\)"):
        top_units(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"labels \(3,\) and bins 8"):
        mutual_information(x, y[:3])
