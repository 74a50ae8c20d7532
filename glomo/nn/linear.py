"""The linear layer of attention's projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.kernels.registration import is_plain, wants_gradient

ROWS = 256
"""From so many rows on oneDNN is faster (bench/NOTES.md)."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, as F.linear. On a CPU without gradients oneDNN's product with its bias: PyTorch's own copies
    the bias first, and in fp32 leaves the product to MKL, which is slow on AMD's processors."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(t.dtype == x.dtype for t in tensors)
        and x.size(-1) == weight.size(-1) > 0
        and x.numel() >= ROWS * x.size(-1)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not wants_gradient(*tensors)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and is_plain(tensors)
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
