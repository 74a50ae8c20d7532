"""The snippets of the techniques' page run, in their order."""

from pathlib import Path

import torch
from support_pages import run_page

import glomo.transfer

PAGE = Path(glomo.transfer.__file__).with_name("README.md")


def test_the_page_runs(capsys):
    names = run_page(PAGE)
    assert "stage last 3: " in capsys.readouterr().out
    assert names["features"].shape == (2, 7, 16)
    assert torch.isfinite(names["weight"]).all()


def test_every_name_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert all(name in text for name in glomo.transfer.__all__ if name != "LayerGroup")
