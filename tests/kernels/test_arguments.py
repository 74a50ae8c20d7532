"""Wrong arguments: a TypeError or ValueError whose sentence names the argument, never a crash."""

import pytest
import torch

import glomo
from glomo.kernels.backend import OPS
from parity import random


def good():
    return dict(query=random(2, 4, 5, 8), key=random(2, 4, 7, 8), value=random(2, 4, 7, 3))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(query="x"), TypeError, "query must be a tensor, not str"),
        (dict(query=torch.ones(2, 4, 5, 8).long()), TypeError, "query must be a floating-point tensor"),
        (dict(key=random(2, 4, 7, 8).double()), TypeError, "key is torch.float64"),
        (dict(key=random(2, 4, 7, 9)), ValueError, r"key has shape \(2, 4, 7, 9\)"),
        (dict(value=random(2, 4, 6, 3)), ValueError, "value has shape"),
        (dict(key=random(3, 4, 7, 8)), ValueError, "leading dimensions must broadcast"),
        (dict(query=random(8)), ValueError, "query must be"),
        (dict(value=random(2, 4, 7, 3).to("meta")), ValueError, "value is on meta"),
        (dict(bias=torch.ones(5, 7, dtype=torch.bool)), TypeError, "attn_mask"),
        (dict(bias=torch.ones(5, 7, dtype=torch.int64)), TypeError, "bias is torch.int64"),
        (dict(bias="x"), TypeError, "bias must be a float or a tensor"),
        (dict(bias=True), TypeError, "bias must be a float or a tensor"),
        (dict(bias=random(6, 1)), ValueError, r"bias has shape \(6, 1\), which does not broadcast"),
        (dict(bias=random(1, 1, 1, 1, 1)), ValueError, "bias has shape"),
        (dict(attn_mask=random(5, 7)), TypeError, "attn_mask must be a bool tensor"),
        (dict(attn_mask=[True]), TypeError, "attn_mask must be a bool tensor"),
        (dict(attn_mask=torch.ones(5, 6, dtype=torch.bool)), ValueError, "attn_mask has shape"),
        (dict(eps=-1e-9), ValueError, "eps must be 0 or positive"),
        (dict(eps=float("nan")), ValueError, "eps must be 0 or positive"),
        (dict(dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1"),
        (dict(dropout_p=None), TypeError, "dropout_p must be a number, not NoneType"),
        (dict(eps="a"), TypeError, "eps must be a number"),
        (dict(scale=None), TypeError, "scale must be a number"),
        (dict(diagonal=1.5, is_causal=True), TypeError, "diagonal must be a whole number"),
        (
            dict(enable_gqa=True, bias=random(2, 5, 7), key=random(2, 2, 7, 8), value=random(2, 2, 7, 3)),
            ValueError,
            "bias",
        ),
        (
            dict(enable_gqa=True, key=random(2, 3, 7, 8), value=random(2, 3, 7, 3)),
            ValueError,
            "multiple of the key heads",
        ),
        (dict(enable_gqa=True, value=random(2, 2, 7, 3)), ValueError, "as many heads in value"),
    ],
)
def test_relu2_attention(change, error, words):
    with pytest.raises(error, match=words):
        glomo.relu2_attention(**{**good(), **change})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(attn_mask=torch.ones(5, 7).long()), TypeError, "attn_mask is torch.int64"),
        (dict(attn_mask=3), TypeError, "attn_mask must be a bool or floating tensor"),
        (dict(scale="1"), TypeError, "scale must be a number"),
        (dict(attn_mask=random(4, 7)), ValueError, "attn_mask has shape"),
        (dict(dropout_p=-0.1), ValueError, "dropout_p"),
    ],
)
def test_attention(change, error, words):
    with pytest.raises(error, match=words):
        glomo.attention(**{**good(), **change})


def test_help_reads_well():
    for name in OPS:
        doc = getattr(glomo, name).__doc__
        assert all(section in doc for section in ("Args:", "Returns:", "Raises:")), name
