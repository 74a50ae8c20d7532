"""The README's Python runs."""

import re
from pathlib import Path

import torch

import glomo
from glomo.data import Vocabulary
from glomo.nn import GLoMo, GLoMoConfig
from glomo.training import checkpoint
from glomo.training.graph_files import graph_meta

README = Path(__file__).parents[1] / "README.md"


def snippets():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def test_the_op_in_a_model():
    names = {}
    exec(snippets()[0], names)
    model = names["ReluSquaredAttention"](32, 4)
    model(torch.randn(2, 10, 32)).sum().backward()
    assert model.bias.grad.shape == (4, 1, 1)


def test_the_transfer_example(tmp_path, monkeypatch):
    texts = ["the cat sat", "on the mat it sat"]
    vocabulary = Vocabulary.build(texts, 20)
    config = GLoMoConfig(dim=8, layers=2, heads=2, head_dim=4, conv_blocks=1, vocab_size=len(vocabulary))
    meta = graph_meta(config, vocabulary, {})
    checkpoint.save(tmp_path / "runs" / "graph" / "final", GLoMo(config).state_dict(), {}, meta)
    monkeypatch.chdir(tmp_path)
    names = {"glomo": glomo, "texts": texts, "features": torch.randn(2, 5, 50)}
    exec(snippets()[1], names)
    assert names["y"].shape == (2, 5, 50)


def test_every_op_is_in_the_table():
    text = README.read_text(encoding="utf-8")
    assert all(f"`{name}(" in text for name in glomo.__all__ if name != "EPS")
