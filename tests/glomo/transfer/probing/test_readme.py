"""The snippets of the page run, in their order."""

from pathlib import Path

import torch
from support_pages import run_page

import glomo.transfer.probing

PAGE = Path(glomo.transfer.probing.__file__).with_name("README.md")


def test_the_page_runs(capsys):
    torch.manual_seed(0)
    names = run_page(PAGE)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["layer", "accuracy", "majority", "classes", "tested"]
    assert "phrase, other number" in printed
    assert names["of_texts"]["decoder.layers.0"].shape == (192, 64)
    assert len(names["of_units"]["decoder.layers.1"]) == len(names["words"]) == len(names["documents"])
    assert list(names["results"]) == ["decoder.layers.0", "decoder.layers.1", "mix"]
    assert names["results"]["mix"].accuracy > names["results"]["mix"].majority
    assert names["scores"]["plural"].missing == ("wug", "wugs")
    assert names["judged"].pairs == 3
    assert names["importance"].shape == (64,)
    assert names["statistics"].entropy.shape == (4,)


def test_every_name_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in glomo.transfer.probing.__all__ if f"`{name}" not in text and f"{name}(" not in text] == []
