"""Discriminative rates against the published table, and the optimizer's groups."""

import pytest
import torch
from support_transfer import net_and_groups

from glomo.transfer import discriminative_rates, optimizer_groups


def test_published_rates():
    """eta^{l-1} = eta^l / 2.6 for 0.01 at the top (Howard & Ruder 2018)."""
    _, groups = net_and_groups()
    rates = discriminative_rates(groups, 0.01)
    assert rates == pytest.approx(
        {"head": 0.01, "layers.1": 0.0038461538, "layers.0": 0.0014792899, "embedding": 0.00056895766}
    )


def test_optimizer_groups():
    _, groups = net_and_groups()
    made = optimizer_groups(groups, discriminative_rates(groups, 1.0, 2.0), weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"], [p.dim() for p in g["params"]]) for g in made] == [
        ("embedding", 0.125, 0.1, [2]),
        *(("layers.0", 0.25, 0.1, [2]), ("layers.0", 0.25, 0.0, [1, 1, 1])),
        *(("layers.1", 0.5, 0.1, [2]), ("layers.1", 0.5, 0.0, [1, 1, 1])),
        *(("head", 1.0, 0.1, [2]), ("head", 1.0, 0.0, [1])),
    ]
    torch.optim.AdamW(made)
    assert [g["lr"] for g in optimizer_groups(groups, 0.5)] == [0.5] * 4


@pytest.mark.parametrize(("lr", "factor"), [(-1.0, 2.6), (1.0, 0.0), (float("nan"), 2.0)])
def test_mistakes(lr, factor):
    with pytest.raises(ValueError, match=f"lr is {lr} and factor {factor}"):
        discriminative_rates(net_and_groups()[1], lr, factor)
