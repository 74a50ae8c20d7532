"""Tile shapes that a test chooses, and what the kernels remember of earlier calls."""

import collections

import pytest

from glomo.kernels import configurations, triton_attention, triton_backward, use_backend
from glomo.kernels.relu2_attention import triton as attention


@pytest.fixture(autouse=True)
def _forced():
    with use_backend("triton"):
        yield


@pytest.fixture
def tiles(monkeypatch):
    """tiles(shapes): kernels have tiles of these (targets, sources), 32 x 32 if not named, whatever the device is."""

    def use(shapes):
        table = {}
        for kernel in configurations._table("interpreter"):
            m, n = shapes.get(kernel, (32, 32))
            entry = dict(width=256, weight=2, M=m, N=n, features=32, warps=4, stages=1)
            table[kernel] = collections.defaultdict(lambda entry=entry: [entry])
        monkeypatch.setattr(configurations, "_table", lambda name: table)
        forget()

    def forget():
        configurations._entry.cache_clear()
        triton_attention._PLANS.clear()
        triton_backward._CALLS.clear()

    yield use
    monkeypatch.undo()
    forget()


@pytest.fixture
def skipping(monkeypatch):
    """Tiles without a positive score are found and remembered, however few pairs there are."""
    monkeypatch.setattr(attention, "SKIP_FROM", 0)
