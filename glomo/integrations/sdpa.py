"""`F.scaled_dot_product_attention` on glomo's kernels, in code that knows nothing of them."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from glomo.kernels import attention
from glomo.kernels.backend import select_backend


class patch_sdpa(TorchFunctionMode):
    """Within this context :func:`torch.nn.functional.scaled_dot_product_attention` is :func:`glomo.attention` wherever
    that can do the call, and PyTorch's own elsewhere: nested tensors, dtypes and devices without a kernel, arguments
    that PyTorch refuses.

    It reaches every caller in this thread, also those that imported the function under a name of their own,
    ``nn.MultiheadAttention`` and PyTorch's transformer layers in training and evaluation, and modules that
    torch.compile traces inside of the context. A target that may read nothing gives zeros.

    ``calls`` counts what ran: {"glomo: cpu": 12, "pytorch: the reason": 1}; what torch.compile traced is not counted.

    Example:
        >>> with glomo.patch_sdpa() as patch:
        ...     out = model(batch)
        >>> patch.calls
        Counter({'glomo: cpu': 6})
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._multi_head_attention = _with_attention(self._attend)

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head_attention(*args, **kwargs)
        if func is Tensor.unflatten:  # torch.compile cannot trace PyTorch's own wrapper of it within a mode
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = _why_not(query, key, value, *args, *kwargs.values())
        if reason is None:
            try:
                out = cast(Tensor, attention(query, key, value, *args, **kwargs))
            except (TypeError, ValueError) as error:
                reason = str(error)
            else:
                self._count("glomo", select_backend("attention", query, key, value))
                return out
        self._count("pytorch", reason)
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def _count(self, who: str, what: str) -> None:
        if not torch.compiler.is_compiling():
            self.calls[f"{who}: {what}"] += 1


def _why_not(*tensors: Any) -> str | None:
    """Why a call is left to PyTorch, where glomo.attention would not say so itself."""
    for t in tensors:
        if isinstance(t, Tensor) and t.is_nested:
            return "nested tensors"
        plain = type(t) is Tensor or getattr(t, "__torch_function__", None) is torch._C._disabled_torch_function_impl
        if isinstance(t, Tensor) and not plain:
            return f"{type(t).__name__} has a __torch_function__ of its own"
    return None


def _with_attention(attend: Callable) -> Callable:
    """PyTorch's multi_head_attention_forward with another attention. PyTorch itself hands the function to a mode, and
    would call its own attention inside, where the mode is off."""
    original = F.multi_head_attention_forward
    names = original.__globals__ | {"scaled_dot_product_attention": attend, "has_torch_function": lambda *_: False}
    del names["__name__"]  # torch.compile would look for them in the module of that name
    function = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__)
    function.__kwdefaults__ = original.__kwdefaults__
    return function
