"""Packed batches of sequences of different lengths: checks, and the walk over the sequences.

Sequence i holds the rows cu_seqlens[i] .. cu_seqlens[i + 1] of a packed tensor (total, H, D). Backends see grouped
heads as (total, Hk, H / Hk, D) against (total, Hk, 1, D): whatever lies between the first and the last dimension
broadcasts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import accumulator_dtype, check_count, check_floating, shape_of


@dataclass(frozen=True)
class Sequence:
    rows: slice  # its targets
    columns: slice  # its sources
    first_batch_head: int  # flat index of its first head: sequence * heads

    def targets(self, t: Tensor) -> Tensor:
        """(..., length, D) of a packed tensor (total_q, ..., D)."""
        return t[self.rows].movedim(0, -2)

    def sources(self, t: Tensor) -> Tensor:
        """(..., length, D) of a packed tensor (total_k, ..., D)."""
        return t[self.columns].movedim(0, -2)

    def pairs(self, t: Tensor | None) -> Tensor | None:
        """(..., length or 1, length or 1) of a bias (total_q or 1, total_k or 1, ...)."""
        if t is None:
            return None
        rows = self.rows if t.size(0) != 1 else slice(None)
        columns = self.columns if t.size(1) != 1 else slice(None)
        return t[rows, columns].movedim((0, 1), (-2, -1))


def sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, query: Tensor, key: Tensor) -> Iterator[Sequence]:
    """The sequences of a packed batch. Reads the boundaries on the host.

    Raises:
        ValueError: boundaries that do not start at 0, decrease, or do not end at the packed tensor's length.
    """
    starts_q = _boundaries("cu_seqlens_q", cu_seqlens_q, "query", query)
    starts_k = _boundaries("cu_seqlens_k", cu_seqlens_k, "key", key)
    heads = query.shape[1:-1].numel()
    for i in range(len(starts_q) - 1):
        yield Sequence(slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1]), i * heads)


def _boundaries(name: str, cu_seqlens: Tensor, of: str, packed: Tensor) -> list[int]:
    values: list[int] = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != packed.size(0) or any(a > b for a, b in itertools.pairwise(values)):
        shown = f"{values[:8]}{'...' if len(values) > 8 else ''}"
        raise ValueError(f"{name} must rise from 0 to the {packed.size(0)} rows of {of}, but is {shown}.")
    return values


def forward_sequences(
    run: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """run(q, k, v, bias, first_batch_head) -> (out, row statistic) for every sequence, packed again."""
    out = query.new_empty(*query.shape[:-1], value.size(-1))
    statistic = torch.empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype), device=query.device)
    for s in sequences(cu_seqlens_q, cu_seqlens_k, query, key):
        o, z = run(s.targets(query), s.sources(key), s.sources(value), s.pairs(bias), s.first_batch_head)
        s.targets(out).copy_(o)
        s.targets(statistic[..., None]).copy_(z[..., None])
    return out, statistic


def backward_sequences(
    run: Callable[..., list[Tensor]],
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """run(grad_outputs, outputs, q, k, v, bias, first_batch_head) -> gradients, packed again; empty if not needed."""
    dtype = accumulator_dtype(query.dtype)
    totals = [
        torch.zeros(t.shape, dtype=t.dtype if i < 3 else dtype, device=t.device) if need and t is not None else None
        for i, (t, need) in enumerate(zip((query, key, value, bias), needs, strict=True))
    ]

    def rows(s: Sequence, pair: list[Tensor]) -> list[Tensor]:
        return [s.targets(pair[0]), s.targets(pair[1][..., None]).squeeze(-1)]

    for s in sequences(cu_seqlens_q, cu_seqlens_k, query, key):
        q, k, v, b = s.targets(query), s.sources(key), s.sources(value), s.pairs(bias)
        gradients = run(rows(s, grad_outputs), rows(s, outputs), q, k, v, b, s.first_batch_head)
        for i, (total, gradient) in enumerate(zip(totals, gradients, strict=True)):
            if total is not None:
                part = s.pairs(total) if i == 3 else s.sources(total) if i else s.targets(total)
                assert part is not None
                part.add_(gradient)
    return [
        query.new_empty(0) if total is None or t is None else total.to(t.dtype)
        for t, total in zip((query, key, value, bias), totals, strict=True)
    ]


def check_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    enable_gqa: bool,
) -> None:
    """Shapes of query (total_q, H, E), key (total_k, H, E), value (total_k, H, Ev) and the boundaries (batch + 1,)."""
    check_floating(query=query, key=key, value=value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 3:
            raise ValueError(f"{name} must be packed as (total, H, D), but has shape {shape_of(t)}.")
    if key.size(-1) != query.size(-1):
        raise ValueError(f"key {shape_of(key)} must have the query's last dimension, {query.size(-1)}.")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value {shape_of(value)} must have the key's length and heads, {tuple(key.shape[:-1])}.")
    if enable_gqa:
        if key.size(1) == 0 or query.size(1) % key.size(1):
            raise ValueError(
                f"enable_gqa needs the query heads ({query.size(1)}) to be a multiple of the key heads ({key.size(1)})."
            )
    elif key.size(1) != query.size(1):
        raise ValueError(f"key has {key.size(1)} heads, but query has {query.size(1)} (enable_gqa is off).")
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be an int32 or int64 tensor, not {getattr(t, 'dtype', type(t).__name__)}.")
        if t.dim() != 1 or t.size(0) < 1:
            raise ValueError(f"{name} must have shape (batch + 1,), but has {shape_of(t)}.")
        if t.device != query.device:
            raise ValueError(f"{name} is on {t.device}, but must be on the query's device, {query.device}.")
    if cu_seqlens_q.size(0) != cu_seqlens_k.size(0):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must describe the same number of sequences, but have "
            f"{cu_seqlens_q.size(0)} and {cu_seqlens_k.size(0)} entries."
        )
    check_count("max_seqlen_q", max_seqlen_q)
    check_count("max_seqlen_k", max_seqlen_k)
    if (
        query.device.type == "cpu" and not torch.compiler.is_compiling()
    ):  # elsewhere reading them would wait for the GPU
        for side, size, cu_seqlens, of, t in (
            ("q", max_seqlen_q, cu_seqlens_q, "query", query),
            ("k", max_seqlen_k, cu_seqlens_k, "key", key),
        ):
            starts = _boundaries(f"cu_seqlens_{side}", cu_seqlens, of, t)
            longest = max((b - a for a, b in itertools.pairwise(starts)), default=0)
            if longest > size:
                raise ValueError(f"max_seqlen_{side} is {size}, but the longest sequence has {longest}.")


def varlen_bias(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Canonical form (total_q or 1, total_k or 1, H or 1) of a bias (), (H,), (total_q, H), (total_k, H),
    (total_q, 1, H) or (1, total_k, H). Where total_q = total_k, a 2-D bias is per target."""
    if bias is None:
        return None
    total_q, heads, total_k = query.size(0), query.size(1), key.size(0)
    if bias.dim() == 0:
        return bias[None, None, None]
    if bias.shape == (heads,):
        return bias[None, None]
    if bias.shape == (total_q, heads):
        return bias[:, None]
    if bias.shape == (total_k, heads):
        return bias[None]
    if bias.shape in ((total_q, 1, heads), (1, total_k, heads), (1, 1, heads)):
        return bias
    raise ValueError(
        f"bias has shape {shape_of(bias)}, but must be a float, (H,) = ({heads},), per target (total_q, H) = "
        f"{(total_q, heads)} or per source (total_k, H) = {(total_k, heads)}; a per-source bias may be given as "
        "(1, total_k, H), which is needed where total_q = total_k."
    )


def split_heads(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Grouped heads as broadcasting: query (total_q, Hk, H / Hk, E), key and value (total_k, Hk, 1, ...)."""
    groups = (key.size(1), query.size(1) // key.size(1))
    if bias is not None:
        bias = bias[..., None] if bias.size(-1) == 1 else bias.unflatten(-1, groups)
    return query.unflatten(1, groups), key.unsqueeze(2), value.unsqueeze(2), bias
