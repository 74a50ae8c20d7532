"""Buffers that keep their precision when a model is cast to a narrower one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class WideBuffers(nn.Module):
    """A module whose tensors, and those in its children, `.half()`, `.bfloat16()` and `.to(dtype)` do not make
    narrower: sums and anchors would lose what they are for. A wider type, and another device, they take."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def widened(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            wide = torch.promote_types(new.dtype, tensor.dtype)
            return new if new.dtype == wide else tensor.to(new.device, wide)

        return super()._apply(widened, recurse)
