"""The README's Python runs."""

import re
from pathlib import Path

import pytest
import torch

import glomo
from glomo.nn.awd_lstm import AWDLSTMConfig
from glomo.training.documents import FinetuneData
from glomo.training.finetune import finetune
from glomo.training.finetune_config import FinetuneConfig
from glomo.training.train_config import TrainConfig

README = Path(__file__).parents[1] / "README.md"


def snippets():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def test_the_op_in_a_model():
    names = {}
    exec(snippets()[0], names)
    model = names["ReluSquaredAttention"](32, 4)
    model(torch.randn(2, 10, 32)).sum().backward()
    assert model.bias.grad.shape == (4, 1, 1)


def test_the_module_in_the_place_of_pytorchs():
    names = {}
    exec(snippets()[1], names)
    x = torch.randn(2, 5, 64)
    plain = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
    plain.load_state_dict(names["layer"].state_dict())
    torch.testing.assert_close(names["layer"](x), plain(x))


def test_the_patch_and_hugging_face():
    names = {"glomo": glomo, "model": torch.nn.MultiheadAttention(8, 2), "batch": torch.randn(3, 1, 8)}
    exec(snippets()[2].replace("model(batch)", "model(batch, batch, batch, need_weights=False)"), names)
    assert sum(names["patch"].calls.values()) == 1
    pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
    exec(snippets()[3], names)
    tokens = torch.randint(5, 90, (2, 6))
    ours = names["bert"].eval()(tokens).last_hidden_state
    names["bert"].set_attn_implementation("sdpa")
    torch.testing.assert_close(ours, names["bert"](tokens).last_hidden_state)


def test_the_transfer_example():
    names = {"texts": ["the cat sat", "on the mat it sat"], "features": torch.randn(2, 5, 50)}
    exec(snippets()[5], names)
    assert names["y"].shape == (2, 5, names["fuse"].out_dim)
    assert torch.equal(names["y"][..., :50], names["features"])


def test_classifiers_together(tmp_path, monkeypatch, capsys):
    examples = tmp_path / "x.csv"
    examples.write_text("text,label\n" + "who is it,HUM\nwhere is it,LOC\n" * 8)
    data = FinetuneData(str(examples), str(examples), valid=0.0)
    lstm, train = AWDLSTMConfig.preset("tiny"), TrainConfig(steps=1, progress=0.0, eval_every=0, device="cpu")
    for name in ("trec", "trec-backward"):
        finetune(FinetuneConfig(data, lstm=lstm, train=train), tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    exec(snippets()[4], {})
    assert capsys.readouterr().out.strip() in ("['HUM']", "['LOC']")


def test_every_op_is_in_the_table():
    text = README.read_text(encoding="utf-8")
    assert all(f"`{name}(" in text for name in glomo.__all__ if name != "EPS")
