"""The snippets of the page on LSTM language models run, in their order, and say what they are said to."""

from pathlib import Path

import torch
from support_pages import run_page

import glomo.nn


def test_the_page_runs():
    names = run_page(Path(glomo.nn.__file__).with_name("README.md"))
    assert len(names["history"]) == 8
    assert names["features"].shape == (3, 96)
    assert names["logits"].shape == (3, 2)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(names["plain"](x)[0], names["layer"].eval()(x)[0])
    assert all(p.grad is not None for p in names["classifier"].head.parameters())
