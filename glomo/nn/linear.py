"""The linear layer of attention's projections."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.kernels.registration import is_unwatched, wants_gradient

ROWS = 256
"""From so many rows on oneDNN is faster (bench/NOTES.md)."""


@functools.cache
def _has_bf16() -> bool:
    """Whether oneDNN's products in bf16 run here: AVX-512 at least."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, as F.linear. On a CPU without gradients oneDNN's product with its bias: PyTorch's own copies
    the bias first, and in fp32 leaves the product to MKL, which is slow on AMD's processors."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if (
        all(t.device.type == "cpu" and t.dtype == x.dtype for t in tensors)
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _has_bf16()))
        and weight.dim() == 2
        and x.size(-1) == weight.size(1) > 0
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))  # its stride would not be read
        and x.numel() >= ROWS * x.size(-1)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not wants_gradient(*tensors)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and is_unwatched(tensors)
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
