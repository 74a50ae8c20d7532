"""Argument checks and canonical forms that the ops share.

Every check raises TypeError or ValueError with one sentence: the argument, what it was, what is needed.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

EPS = 1e-6
"""Default of the ReLU² ops' eps: added to the sum of squares before the division."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores, squares and sums are fp64 for fp64 inputs and fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts as autocast casts SDPA's inputs: floating tensors other than fp64 go to the autocast dtype.

    It comes before the checks, which see what the op will see (and refuse what is no tensor)."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def shape_of(t: Tensor) -> str:
    return str(tuple(t.shape))


def check_floating(**tensors: Tensor) -> None:
    """All are floating tensors of one dtype on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(t).__name__}.")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, not {t.dtype}.")
        if t.dtype != first.dtype:
            raise TypeError(f"{name} is {t.dtype}, but must have the dtype of {first_name}, {first.dtype}.")
        if t.device != first.device:
            raise ValueError(f"{name} is on {t.device}, but must be on the device of {first_name}, {first.device}.")


def check_same_device(query: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != query.device:
            raise ValueError(f"{name} is on {t.device}, but must be on the query's device, {query.device}.")


def check_rank(minimum: int, layout: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dim() < minimum:
            raise ValueError(f"{name} must be {layout}, but has shape {shape_of(t)}.")


def broadcast(*leads: torch.Size) -> torch.Size:
    """torch.broadcast_shapes, without its time where there is nothing to broadcast."""
    return leads[0] if all(lead == leads[0] for lead in leads) else torch.broadcast_shapes(*leads)


def broadcast_lead(**tensors: Tensor) -> torch.Size:
    """Common shape of the leading dimensions (all but the last two) of the tensors."""
    try:
        return broadcast(*[t.shape[:-2] for t in tensors.values()])
    except RuntimeError:
        shapes = ", ".join(f"{name} {shape_of(t)}" for name, t in tensors.items())
        raise ValueError(f"The leading dimensions must broadcast, but the shapes are {shapes}.") from None


def at_least_2d(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dim() >= 2 else t[(None,) * (2 - t.dim())]


def check_last(name: str, t: Tensor, dim: int, size: int, of: str) -> None:
    if t.size(dim) != size:
        raise ValueError(f"{name} has shape {shape_of(t)}, but its dimension {dim} must be {size}, as in {of}.")


def check_broadcastable(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    """t broadcasts to shape without enlarging it."""
    sizes = tuple(t.shape)
    fits = len(sizes) <= len(shape) and all(a in (1, b) for a, b in zip(reversed(sizes), reversed(shape), strict=False))
    if not fits:
        raise ValueError(f"{name} has shape {shape_of(t)}, which does not broadcast to {tuple(shape)}.")


def check_qk(query: Tensor, key: Tensor, value: Tensor | None) -> None:
    """Shapes of query (..., T, E), key (..., S, E) and value (..., S, Ev), their leading dimensions aside."""
    check_floating(query=query, key=key, **({} if value is None else {"value": value}))
    check_rank(2, "(..., T, E)", query=query)
    check_rank(2, "(..., S, E)", key=key)
    check_last("key", key, -1, query.size(-1), "the query")
    if value is not None:
        check_rank(2, "(..., S, Ev)", value=value)
        check_last("value", value, -2, key.size(-2), "the key")


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}.")


def check_count(name: str, value: int, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, but is {value}.")


def check_diagonal(is_causal: bool, diagonal: int) -> int | None:
    """The diagonal where the call is causal, None where it is not."""
    if isinstance(diagonal, bool) or not isinstance(diagonal, int):
        raise TypeError(f"diagonal must be a whole number, not {type(diagonal).__name__}.")
    return diagonal if is_causal else None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside an op the dtypes are the op's own choice: an autocast around the call must not change its products."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def check_probability(dropout_p: float) -> None:
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, but is {dropout_p}.")


def check_eps(eps: float) -> None:
    check_number("eps", eps)
    if not eps >= 0.0:
        raise ValueError(f"eps must be 0 or positive, but is {eps}.")


def dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """A seed for one call's dropout, drawn from the default generator of the device; None without dropout."""
    if dropout_p == 0.0:
        return None
    return torch.randint(torch.iinfo(torch.int64).max, (), device=device)


def bias_tensor(bias: float | Tensor | None, query: Tensor) -> Tensor | None:
    """A float bias becomes a 0-d tensor; a bias of nothing or zero is None."""
    if bias is None:
        return None
    if isinstance(bias, Tensor):
        if bias.dtype == torch.bool:
            raise TypeError("bias is a bool tensor; a mask of allowed pairs goes into attn_mask.")
        if bias.dtype not in (query.dtype, torch.float32):
            raise TypeError(
                f"bias is {bias.dtype}, but must be a float, or of the query's dtype {query.dtype} or fp32."
            )
        return bias
    if isinstance(bias, bool) or not isinstance(bias, (int, float)):
        raise TypeError(f"bias must be a float or a tensor, not {type(bias).__name__}.")
    if bias == 0:
        return None
    return torch.full((), float(bias), dtype=accumulator_dtype(query.dtype), device=query.device)


def check_bool_mask(attn_mask: Tensor | None) -> None:
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a bool tensor, not {type(attn_mask).__name__}.")
    if attn_mask.dtype != torch.bool:
        raise TypeError(f"attn_mask must be a bool tensor (True = may be read), not {attn_mask.dtype}.")


def bias_and_mask(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """attention's mask: a bool mask says what may be read, a float mask is added to the scores."""
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    return (None, attn_mask) if is_bool else (attn_mask, None)


class HeadGroups:
    """Grouped-query attention as broadcasting: query (..., H, T, E) is seen as (..., Hk, H / Hk, T, E) and key, value
    (..., Hk, S, E) as (..., Hk, 1, S, E), so that the backends only ever broadcast leading dimensions."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor | None) -> None:
        for name, t in (("query", query), ("key", key), ("value", value)):
            if t is not None and t.dim() < 3:
                raise ValueError(f"enable_gqa needs a heads dimension, but {name} has shape {shape_of(t)}.")
        self.heads, self.key_heads = query.size(-3), key.size(-3)
        if value is not None and value.size(-3) != self.key_heads:
            raise ValueError(
                f"enable_gqa needs as many heads in value ({value.size(-3)}) as in key ({self.key_heads})."
            )
        if self.key_heads == 0 or self.heads % self.key_heads:
            raise ValueError(
                f"enable_gqa needs the query heads ({self.heads}) to be a multiple of the key heads ({self.key_heads})."
            )

    def split_query(self, query: Tensor) -> Tensor:
        return query.unflatten(-3, (self.key_heads, self.heads // self.key_heads))

    def split_key(self, key: Tensor) -> Tensor:
        return key.unsqueeze(-3)

    def split_pairs(self, name: str, t: Tensor | None) -> Tensor | None:
        """For a tensor that broadcasts to (..., H, T, S)."""
        if t is None or t.dim() < 3:
            return t
        if t.size(-3) not in (1, self.heads):
            raise ValueError(
                f"{name} has shape {shape_of(t)}, but its dimension -3 must be 1 or the {self.heads} query heads."
            )
        return self.split_query(t) if t.size(-3) == self.heads else t.unsqueeze(-3)
