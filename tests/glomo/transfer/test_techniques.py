"""Which groups learn when, and at which rates, against the tables of the papers."""

import math

import pytest
from support_transfer import net_and_groups

from glomo.transfer import (
    auxiliary_weight,
    chain_thaw,
    feature_extraction,
    freeze_all_but_top,
    full,
    gradual_unfreezing,
    sequential_unfreezing,
    slanted_triangular,
)

NAMES = ["embedding", "layers.0", "layers.1", "head"]


@pytest.fixture
def groups():
    return net_and_groups()[1]


def table(stages):
    return [(list(stage.rates), stage.steps) for stage in stages]


def test_full(groups):
    assert table(full(groups, 9, 0.1)) == [(NAMES, 9)]
    assert [*next(full(groups, 9, 1.0, 2.0)).rates.values()] == [0.125, 0.25, 0.5, 1.0]


def test_top(groups):
    (stage,) = freeze_all_but_top(groups, 9, 0.1)
    assert (stage.rates, stage.frozen) == ({"head": 0.1}, "train")
    (stage,) = feature_extraction(groups, 9, 0.1, count=2)
    assert (stage.rates, stage.frozen) == ({"layers.1": 0.1, "head": 0.1}, "eval")
    with pytest.raises(ValueError, match="count is 5; of 4 layer groups"):
        next(freeze_all_but_top(groups, 9, 0.1, count=5))


def test_gradual_unfreezing(groups):
    """The last layer, one more each epoch, all to the end; eta^{l-1} = eta^l / 2.6 at every time."""
    stages = list(gradual_unfreezing(groups, 100, 10, 0.01))
    assert table(stages) == [(NAMES[3:], 10), (NAMES[2:], 10), (NAMES[1:], 10), (NAMES, 70)]
    for stage in stages:
        assert stage.rates == pytest.approx({n: 0.01 / 2.6 ** (3 - NAMES.index(n)) for n in stage.rates})


def test_gradual_unfreezing_as_in_the_scripts(groups):
    stages = list(gradual_unfreezing(groups, 100, 10, 0.01, depth=2))
    assert table(stages) == [(NAMES[3:], 10), (NAMES[2:], 10), (NAMES, 80)]


@pytest.mark.parametrize("restart", [False, True])
def test_a_schedule_over_all_stages_or_each(groups, restart):
    stages = gradual_unfreezing(groups, 100, 20, 1.0, depth=2, schedule=slanted_triangular, restart=restart)
    found = [
        stage.factor(stage.first + step, stage.span or stage.steps) for stage in stages for step in range(stage.steps)
    ]
    lengths = (20, 20, 60) if restart else (100,)
    assert found == pytest.approx([slanted_triangular(t, n) for n in lengths for t in range(n)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 30, "stage_steps": 10}, "3 stages of 10 steps leave nothing of 30 steps .* at least 31"),
        ({"steps": 30, "stage_steps": 1, "depth": 4}, "depth is 4; of 4 layer groups 0 to 3"),
    ],
)
def test_gradual_unfreezing_refuses(groups, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        list(gradual_unfreezing(groups, lr=1.0, **options))


def test_chain_thaw(groups):
    """New layer at 1e-3; the others alone from the first on, and all, at 1e-4; each stage to its best weights."""
    stages = list(chain_thaw(groups, 52))
    assert table(stages) == [(["head"], 10), (["embedding"], 10), (["layers.0"], 10), (["layers.1"], 10), (NAMES, 12)]
    assert [set(stage.rates.values()) for stage in stages] == [{1e-3}, {1e-4}, {1e-4}, {1e-4}, {1e-4}]
    assert [stage.fresh for stage in stages] == [False, True, True, True, True]
    assert all(stage.restore and stage.patience == 5 for stage in stages)
    assert not any(stage.restore for stage in chain_thaw(groups, 52, patience=0))
    with pytest.raises(ValueError, match="4 steps are too few for 5 stages"):
        list(chain_thaw(groups, 4))


def test_sequential_unfreezing(groups):
    """n = 2, k = 5: one epoch of the head, three without the embedding, then all."""
    stages = list(sequential_unfreezing(groups, 100, 10, lr=1.0, lower_lr=0.5))
    assert table(stages) == [(NAMES[3:], 10), (NAMES[1:], 30), (NAMES, 60)]
    assert stages[-1].rates == {"embedding": 0.5, "layers.0": 0.5, "layers.1": 0.5, "head": 1.0}
    assert table(sequential_unfreezing(groups, 100, 10, n=1, k=1)) == [(NAMES, 100)]
    with pytest.raises(ValueError, match="n is 3 and k 2"):
        list(sequential_unfreezing(groups, 100, 10, n=3, k=2))
    with pytest.raises(ValueError, match="4 epochs of 10 steps leave nothing of 40"):
        list(sequential_unfreezing(groups, 40, 10))


def test_the_auxiliary_weight():
    """exp(linspace(-1.6, -2.3, 15)), then constant."""
    found = [auxiliary_weight(epoch) for epoch in range(20)]
    assert found[:15] == pytest.approx([math.exp(-1.6 - 0.05 * e) for e in range(15)])
    assert found[0] == pytest.approx(0.2019, abs=1e-4)
    assert found[14:] == pytest.approx([0.10026] * 6, abs=1e-5)
