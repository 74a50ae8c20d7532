"""Correlations against numpy and against ranks counted one by one."""

import numpy as np
import pytest
import torch

from glomo.transfer.probing import pearson, ranks, spearman


def slow_ranks(x):
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def test_ranks_share_ties():
    assert ranks(torch.tensor([10.0, 30.0, 20.0, 20.0])).tolist() == [1.0, 4.0, 2.5, 2.5]
    x = torch.randint(5, (17, 3), generator=torch.Generator().manual_seed(0)).float()
    for column in range(3):
        assert ranks(x)[:, column].tolist() == slow_ranks(x[:, column].tolist())
    assert ranks(torch.tensor([3])).tolist() == [1.0]
    assert ranks(torch.tensor([-0.0, 0.0])).tolist() == [1.5, 1.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pearson_and_spearman(dtype):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(23, 4, generator=generator).to(dtype), torch.randint(4, (23,), generator=generator)
    a, b = x.double().numpy(), y.double().numpy()
    for column in range(4):
        expected = np.corrcoef(a[:, column], b)[0, 1]
        assert float(pearson(x, y)[column]) == pytest.approx(expected, abs=1e-12)
        expected = np.corrcoef(slow_ranks(a[:, column].tolist()), slow_ranks(b.tolist()))[0, 1]
        assert float(spearman(x, y)[column]) == pytest.approx(expected, abs=1e-12)
    assert pearson(x[:, 0], y).shape == ()


def test_a_published_example():
    """IQ and hours of television, without ties: rho = -29/165."""
    iq = torch.tensor([106, 86, 100, 101, 99, 103, 97, 113, 112, 110])
    hours = torch.tensor([7, 0, 27, 50, 28, 29, 20, 12, 6, 17])
    assert float(spearman(iq, hours)) == pytest.approx(-29 / 165, abs=1e-12)


def test_extremes():
    line = torch.arange(5.0)
    assert float(pearson(line, 3 - 2 * line)) == pytest.approx(-1)
    assert float(spearman(line, line.exp())) == pytest.approx(1)
    assert pearson(torch.stack([torch.full((5,), 0.1), line], 1), line).tolist() == pytest.approx([0, 1])
    assert float(pearson(line, torch.full((5,), 0.1))) == 0
    assert float(pearson(line.double() * 1e-300, line.double() * 1e300)) == pytest.approx(1)  # squares leave fp64


def test_mistakes():
    with pytest.raises(ValueError, match=r"x is \(3,\) and y \(4,\)"):
        pearson(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="1 of the 2 numbers are not finite"):
        spearman(torch.tensor([1.0, float("nan")]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(1, 1, 2\); \(N,\) or \(N, D\)"):
        ranks(torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="at least 2 rows"):
        pearson(torch.zeros(1), torch.zeros(1))
