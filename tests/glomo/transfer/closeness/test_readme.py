"""The snippets of the page run, in their order."""

from pathlib import Path

import torch
from support_pages import run_page

import glomo.transfer.closeness

PAGE = Path(glomo.transfer.closeness.__file__).with_name("README.md")


def test_the_page_runs():
    names = run_page(PAGE)
    assert names["penalty"].new.tolist() == [False, True]
    assert torch.isfinite(names["loss"])
    assert names["lwf"].recorded.shape == (40, 3)
    assert names["fisher"]["encoder.embedding.weight"].any()
    fisher = names["online_ewc"].fisher.get_buffer("0.weight")
    assert fisher.sum() > 0
    assert torch.isfinite(fisher).all()


def test_every_name_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    names = glomo.transfer.closeness.__all__
    assert all(f"`{name}" in text or f"{name}(" in text for name in names)
    assert set(names) == {name for name in names if hasattr(glomo.transfer.closeness, name)}
