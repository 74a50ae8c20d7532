"""The snippets of the page on domains run, in their order."""

from pathlib import Path

import pytest
import torch
from support_pages import run_page

import glomo.transfer.domains

PAGE = Path(glomo.transfer.domains.__file__).with_name("README.md")


def test_the_page_runs(capsys):
    names = run_page(PAGE)
    assert "domain loss 0.6" in capsys.readouterr().out
    assert names["accuracy"] > 0.9
    assert names["found"].chance == pytest.approx(0.6931, abs=1e-4)
    assert torch.isfinite(names["penalty"])
    assert names["before"].shape == names["after"].shape == (400, 2)


def test_every_name_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in glomo.transfer.domains.__all__ if name not in text] == []
    assert sorted(glomo.transfer.domains.__all__) == glomo.transfer.domains.__all__
