"""The snippets of the page run, in their order."""

from pathlib import Path

import torch
from support_pages import run_page

import glomo.transfer.structure

PAGE = Path(glomo.transfer.structure.__file__).with_name("README.md")


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page(PAGE)
    assert [group.name for group in names["groups"]] == ["base", "adapters", "head"]
    assert torch.equal(names["fresh"](names["units"]), names["model"](names["units"]))
    assert names["report"].new[0].startswith("decoder.layers.0.over_memory")
    assert [path.name for path in tmp_path.iterdir()] == ["task.safetensors"]


def test_every_name_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in glomo.transfer.structure.__all__ if f"`{name}" not in text] == []
    assert glomo.transfer.structure.__all__ == sorted(glomo.transfer.structure.__all__)
