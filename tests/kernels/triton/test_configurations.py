"""The choice of a configuration and of the backend."""

import pytest
import torch

import glomo
from glomo.kernels import backend, configurations, explain, triton_lists
from parity import DEVICE, random

KERNELS = tuple(configurations._table("interpreter"))


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
                widths = [(e.get("query", 0), e["width"]) for e in entries]
                assert widths, (name, kernel, products)
                assert widths == sorted(widths), (name, kernel, products)
                for e in entries:
                    assert {e["M"], e["N"]} <= {32, 64, 96, 128}, (name, kernel, e)
                    assert max(e["M"], e["N"]) <= triton_lists.LARGEST_TILE
                    wide = kernel in ("mix", "mix_features") or kernel.endswith("attention")  # two blocks side by side
                    assert wide or e["features"] & (e["features"] - 1) == 0, (name, kernel, e)
                    assert e["features"] in (16, 32, 64, 128, 256, 320, 512), (name, kernel, e)
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
                columns = configurations.block(features)
                tile = configurations.configuration(kernel, torch.empty(1, width), columns, weight)
                assert tile.features <= columns
                if kernel not in ("mix", "mix_features"):  # they take two blocks together
                    assert tile.features == configurations.block(tile.features)


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
