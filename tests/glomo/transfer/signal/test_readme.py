"""The snippets of the page run, in their order, and it has every name."""

from pathlib import Path

import torch
from support_pages import run_page

import glomo.transfer.signal

PAGE = Path(glomo.transfer.signal.__file__).with_name("README.md")


def test_the_page_runs(capsys):
    names = run_page(PAGE)
    said = capsys.readouterr().out
    assert said.startswith("transfer helps: +0.0175 ")
    assert said.strip() in PAGE.read_text(encoding="utf-8")  # the comment beside it
    assert torch.equal(names["outputs"], names["said"][0])
    assert names["members"].shape == (60, 2)
    assert names["teacher"].n_averaged == 3
    assert all(torch.isfinite(p).all() for p in names["student"].parameters())
    assert names["free"] >= 0
    assert len(names["known"]) == 64


def test_every_name_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    names = glomo.transfer.signal.__all__
    assert names == sorted(names)
    assert [
        name for name in names if f"`{name}" not in text and f"{name}(" not in text and name != "TransferEffect"
    ] == []
    assert all(hasattr(glomo.transfer.signal, name) for name in names)
