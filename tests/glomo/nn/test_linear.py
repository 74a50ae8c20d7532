"""The projections' linear layer beside PyTorch's, and when it is not oneDNN's."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from glomo.nn import linear as module
from glomo.nn.linear import ROWS, linear


def tensors(rows=2 * ROWS, dtype=torch.float32):
    return torch.randn(2, rows // 2, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype), torch.randn(40, dtype=dtype)


def by_onednn(*inputs):
    """Whether PyTorch's own linear was not asked."""
    with mock.patch.object(module.F, "linear", wraps=F.linear) as called:
        out = linear(*inputs)
    tolerance = dict(atol=1e-1, rtol=1e-2) if out.dtype == torch.bfloat16 else dict(atol=1e-5, rtol=1e-5)
    exact = F.linear(*(None if t is None else t.double() for t in inputs))
    torch.testing.assert_close(out.double(), exact, **tolerance)
    return not called.called


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_pytorchs(dtype):
    if dtype == torch.bfloat16 and not module._has_bf16():
        pytest.skip("oneDNN has no products in bf16 for this processor")
    x, weight, bias = tensors(dtype=dtype)
    assert by_onednn(x, weight, bias)
    assert by_onednn(x, weight, None)
    assert by_onednn(x.transpose(0, 1), weight[8:32], bias[8:32])
    assert by_onednn(x[..., ::2], weight[:, 1::2], bias)
    assert by_onednn(x.view(-1, 24), weight, bias)
    with torch.inference_mode():
        assert by_onednn(x, weight, bias)
    weight.requires_grad_()
    with torch.no_grad():
        assert by_onednn(x, weight, bias)


def test_is_pytorchs_elsewhere():
    x, weight, bias = tensors()
    few = tensors(rows=ROWS - 2)
    assert not by_onednn(*few)
    assert not by_onednn(x, weight, torch.randn(80)[::2])  # oneDNN would read its neighbours
    assert not by_onednn(x, weight, torch.randn(1))
    assert not by_onednn(x, weight[0], None)
    with mock.patch.object(module, "_has_bf16", return_value=False):
        assert not by_onednn(*tensors(dtype=torch.bfloat16))
    assert not by_onednn(*(t.double() for t in (x, weight, bias)))
    assert not by_onednn(x, weight, bias.requires_grad_())
    assert not by_onednn(torch.randn(2, 0, 24), weight, bias)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        assert not by_onednn(x, weight, bias)


def test_transforms():
    x, weight, _ = tensors()
    out = torch.vmap(lambda row: linear(row, weight, None))(x)
    torch.testing.assert_close(out, F.linear(x, weight))
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight, None), F.linear(x, weight))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(ROWS, 23), weight, None)
