import pytest
import torch

import glomo
from parity import DEVICE, DTYPES, check_parity, random

CU_Q = torch.tensor([0, 3, 3, 10, 11], dtype=torch.int32)
CU_K = torch.tensor([0, 0, 4, 12, 13], dtype=torch.int32)


def packed(dtype=torch.float32, heads_k=4):
    return [random(11, 4, 8, dtype=dtype), random(13, heads_k, 8, dtype=dtype), random(13, heads_k, 5, dtype=dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_k", [4, 2])
@pytest.mark.parametrize("bias_shape", [None, (), (4,), (11, 4), (13, 4), (1, 13, 4)])
def test_relu2_parity(dtype, heads_k, bias_shape):
    def call(query, key, value, bias):
        return glomo.relu2_attention_varlen(
            *(query, key, value, CU_Q, CU_K, 7, 8, bias),
            is_causal=True,
            diagonal=1,
            dropout_p=0.2,
            enable_gqa=heads_k != 4,
            return_normalizer=True,
        )

    bias = None if bias_shape is None else random(*bias_shape)
    check_parity(call, [*packed(dtype, heads_k), bias])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_k", [4, 2])
def test_softmax_parity(dtype, heads_k):
    def call(query, key, value):
        return glomo.attention_varlen(
            query, key, value, CU_Q, CU_K, 7, 8, is_causal=True, dropout_p=0.2, enable_gqa=heads_k != 4, return_lse=True
        )

    check_parity(call, packed(dtype, heads_k))


def pack(padded, lengths):
    return torch.cat([padded[i, :, :n].transpose(0, 1) for i, n in enumerate(lengths)])


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_equals_the_padded_batch(dropout_p):
    """Sequence by sequence the same numbers as the padded call with a mask, dropout included."""
    lengths = [5, 2, 7]
    cu = torch.tensor([0, 5, 7, 14])
    query, key, value, bias = random(3, 4, 7, 8), random(3, 4, 7, 8), random(3, 4, 7, 3), random(3, 4, 7, 1)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None])[:, None, None]
    q, k, v, b = (pack(t, lengths) for t in (query, key, value, bias))
    b = b.squeeze(-1)
    torch.manual_seed(3)
    padded = glomo.relu2_attention(query, key, value, bias, mask, is_causal=True, diagonal=-1, dropout_p=dropout_p)
    torch.manual_seed(3)
    out = glomo.relu2_attention_varlen(q, k, v, cu, cu, 7, 7, b, is_causal=True, diagonal=-1, dropout_p=dropout_p)
    torch.testing.assert_close(out, pack(padded, lengths))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_softmax_equals_the_padded_batch(dropout_p):
    lengths = [5, 2, 7]
    cu = torch.tensor([0, 5, 7, 14])
    query, key, value = random(3, 4, 7, 8), random(3, 4, 7, 8), random(3, 4, 7, 3)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None])[:, None, None]
    q, k, v = (pack(t, lengths) for t in (query, key, value))
    torch.manual_seed(3)
    padded = glomo.attention(query, key, value, mask, dropout_p=dropout_p)
    torch.manual_seed(3)
    out = glomo.attention_varlen(q, k, v, cu, cu, 7, 7, dropout_p=dropout_p)
    torch.testing.assert_close(out, pack(padded, lengths))


def test_empty_batch():
    cu = torch.zeros(1, dtype=torch.int64)
    query = random(0, 4, 8).requires_grad_()
    out, z = glomo.relu2_attention_varlen(query, query, query, cu, cu, 0, 0, return_normalizer=True)
    assert out.shape == (0, 4, 8)
    assert z.shape == (0, 4)
    out.sum().backward()
    assert query.grad.shape == (0, 4, 8)


@pytest.mark.skipif(DEVICE != "cpu", reason="reading the boundaries would wait for the GPU")
@pytest.mark.parametrize("cu", [[0, 5, 4, 11], [0, 5, 10], [1, 5, 11], [0, 5, 12]])
def test_boundaries_out_of_order(cu):
    query = random(11, 2, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must rise from 0 to the 11 rows of query"):
        glomo.relu2_attention_varlen(
            query, query, query, torch.tensor(cu), torch.tensor([0, 3, 5, 11][: len(cu)]), 11, 11
        )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(cu_seqlens_q=CU_Q.float()), TypeError, "cu_seqlens_q must be an int32 or int64"),
        (dict(cu_seqlens_k=CU_K[:-1]), ValueError, "same number of sequences"),
        (dict(max_seqlen_q=-1), ValueError, "max_seqlen_q"),
        (dict(max_seqlen_k=None), TypeError, "max_seqlen_k must be a whole number"),
        (dict(max_seqlen_q=6), ValueError, "max_seqlen_q is 6, but the longest sequence has 7"),
        (dict(value=random(12, 4, 5)), ValueError, "value"),
        (dict(key=random(13, 3, 8), value=random(13, 3, 5)), ValueError, "key has 3 heads"),
        (dict(bias=random(12, 4)), ValueError, r"bias has shape \(12, 4\)"),
        (dict(query=random(11, 32)), ValueError, r"query must be packed"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    if DEVICE != "cpu" and change == dict(max_seqlen_q=6):
        pytest.skip("reading the boundaries would wait for the GPU")
    query, key, value = packed()
    arguments = dict(
        query=query, key=key, value=value, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, max_seqlen_q=7, max_seqlen_k=8
    )
    with pytest.raises(error, match=words):
        glomo.relu2_attention_varlen(**{**arguments, **change})
