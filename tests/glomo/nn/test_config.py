import dataclasses
import json

import pytest

from glomo.errors import UserError
from glomo.nn import GLoMoConfig


def test_released_preset_holds_the_published_numbers():
    config = GLoMoConfig.preset("released")
    assert (config.dim, config.layers, config.heads, config.head_dim) == (512, 3, 8, 256)
    assert (config.conv_blocks, config.kernel_size, config.horizon, config.positions) == (4, 3, 3, 20)
    assert (config.sparsity, config.update, config.eps, config.scale) == ("threshold", "gru_product", 1e-16, 1.0)


def test_options_of_ours_are_off_in_both_presets():
    for name in ("paper", "released"):
        config = GLoMoConfig.preset(name)
        assert not config.distance_bias
        assert not config.masked_sources
        assert not config.rescue_weight
        assert not config.norm_aggregate
        assert not config.coupled
        assert (config.activation, config.objective) == ("relu2", "unit")


def test_a_config_survives_json():
    config = GLoMoConfig.preset("released", vocab_size=50, masked_sources=[3, 4], scaled=True)
    assert GLoMoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.scale == 1 / 16
    assert dataclasses.is_dataclass(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"horzion": 2}, ["horzion", "horizon"]),
        ({"sparsity": "top"}, ["sparsity", "top", "bias"]),
        ({"dim": 10, "heads": 4}, ["10", "4"]),
        ({"horizon": 0}, ["horizon", "0", "1"]),
        ({"eps": -1.0}, ["eps", "-1"]),
        ({"rescue_weight": 1.0, "activation": "softmax"}, ["rescue_weight", "softmax"]),
        ({"l1_weight": 1.0, "activation": "softmax"}, ["l1_weight", "softmax"]),
    ],
)
def test_bad_values_are_sentences(overrides, words):
    with pytest.raises(UserError) as caught:
        GLoMoConfig.preset("paper", **overrides)
    assert all(word in str(caught.value) for word in words)


def test_unknown_preset():
    with pytest.raises(UserError, match=r"papers.*paper, released"):
        GLoMoConfig.preset("papers")
