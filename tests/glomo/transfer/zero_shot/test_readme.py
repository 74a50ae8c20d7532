"""The snippets of the page on classes without examples run, in their order."""

from pathlib import Path

import torch
from support_pages import run_page

import glomo.transfer.zero_shot
from glomo.transfer.zero_shot import hit_at_k

PAGE = Path(glomo.transfer.zero_shot.__file__).with_name("README.md")


def test_the_page_runs(capsys):
    names = run_page(PAGE)
    printed = capsys.readouterr().out
    assert "seen 1.00, unseen 1.00, harmonic mean 1.00" in printed
    assert "spread of the labels" in printed
    assert names["hits"] == 1
    assert names["scores"].shape == (10, 8)
    assert names["apart"] > 0.3
    assert names["together"] < 0.05
    assert hit_at_k(names["by_hinge"], names["of_class"]) > 0.9
    assert hit_at_k(names["by_pulling"], names["of_class"]) < 0.3  # chance is 0.125
    assert torch.isfinite(names["loss"])
    assert names["nearest"].tolist() == [1, 0]
    assert names["word"] == "kit"


def test_every_name_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in glomo.transfer.zero_shot.__all__ if name not in text] == []
    assert sorted(glomo.transfer.zero_shot.__all__) == glomo.transfer.zero_shot.__all__
