"""What numbers are summed in: half precision has too few digits."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of this type are summed: fp64 stays, half precision becomes fp32."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """The numbers in this type."""
    return x.to(at_least_fp32(x.dtype))
