"""relu2_attention and attention in C++ (csrc/cpu), the host's side: outputs, and tensors as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import broadcast
from .cpu_arguments import BiasSums, empty_rows, gradient_buffer, summed, unless_empty, with_lead
from .registration import fake_packed_rows, fake_rows

TILE = 64
"""Targets, and sources, of a tile (csrc/cpu/problem.h)."""
RELU2, SOFTMAX = 0, 1
"""How scores become weights (csrc/cpu/problem.h)."""

Numbers = tuple[float, int | None, float, float]  # dropout_p, diagonal, scale, eps


def residual_shape(lead: Sequence[int], query: Tensor, value: Tensor, rows: int, save: bool) -> tuple[int, ...]:
    """Shape of the third output, what out lost by rounding: the gradient's delta needs it in half precision."""
    return (*lead, rows, value.size(-1)) if save and query.dtype != torch.float32 else (0,)


def active_shape(lead: Sequence[int], query: Tensor, key: Tensor, save: bool) -> tuple[int, ...]:
    """Shape of the fourth output: which tiles have a pair that counts."""
    return (*lead, _tiles(query), _tiles(key)) if save else (0,)


def _tiles(t: Tensor) -> int:
    return (t.size(-2) + TILE - 1) // TILE


def heads_inside(query: Tensor) -> bool:
    """Whether the heads of a query (B, H, T, E) lie side by side in memory. Then those of the output and the gradients
    do as well: a model that puts them together again need not copy."""
    if query.dim() != 4:
        return False
    if torch.compiler.is_compiling():  # strides may be unknown
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(query.stride(1) < query.stride(2))
    return query.stride(1) < query.stride(2)


def laid_out(op: Any) -> Any:
    """op with one more argument: `heads_inside`. Decided outside of it, so that there is one decision in a trace."""
    return lambda *inputs: op(*inputs, heads_inside(inputs[0]))


def fake_gradients(
    outputs: Sequence[Tensor], query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any
) -> list[Tensor | None]:
    """Shapes of backward's gradients; the last argument is `heads_inside`."""
    lead = outputs[0].shape[:-2]
    rows = [empty_rows(t, t.shape, rest[-1] and t.shape[:-2] == lead) for t in (query, key, value)]
    return [*rows, None if bias is None else bias.new_empty(bias.shape)]


def fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Shapes of forward's outputs; the last arguments say whether a backward pass may follow, and `heads_inside`."""
    out, statistic = fake_rows(query, key, value)
    lead, (save, inside) = out.shape[:-2], rest[-2:]
    out = empty_rows(query, out.shape, inside)
    residual = query.new_empty(residual_shape(lead, query, value, query.size(-2), save), dtype=torch.float32)
    active = query.new_empty(active_shape(lead, query, key, save), dtype=torch.int8)
    return out, statistic, residual, active, statistic.new_empty(statistic.shape if save else (0,))


def fake_packed(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Shapes of packed_forward's outputs."""
    out, statistic = fake_packed_rows(query, key, value)
    lead, save = query.shape[1:-1], rest[-1]
    residual = query.new_empty(residual_shape(lead, query, value, query.size(0), save), dtype=torch.float32)
    return out, statistic, residual, statistic.new_empty((*lead, query.size(0)) if save else (0,))


def forward(
    rule: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    numbers: Numbers,
    save: bool,
    inside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, Z or lse, residual, active tiles, what lse lost by rounding); save: whether a backward pass may follow,
    which the last three are for; inside: `heads_inside`."""
    lead = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    out = empty_rows(query, (*lead, query.size(-2), value.size(-1)), inside)
    statistic = query.new_empty(out.shape[:-1], dtype=torch.float32)
    residual = query.new_empty(residual_shape(lead, query, value, query.size(-2), save), dtype=torch.float32)
    active = query.new_zeros(active_shape(lead, query, key, save), dtype=torch.int8)
    correction = statistic.new_empty(statistic.shape if save and rule == SOFTMAX else (0,))
    torch.ops.glomo_cpu.attention_forward(
        rule, *with_lead(lead, query, key, value, bias, attn_mask), seed, None, None, out, statistic,
        unless_empty(residual), unless_empty(active), unless_empty(correction), *numbers,
    )  # fmt: skip
    return out, statistic, residual, active, correction


def backward(
    rule: int,
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    numbers: Numbers,
    needs: list[bool],
    inside: bool,
) -> list[Tensor]:
    """Gradients of query, key, value and bias; inside: `heads_inside`."""
    (dout, dstatistic), (out, statistic, residual, active, *correction) = grad_outputs, outputs
    return _gradients(
        rule, dout, dstatistic, out, statistic, (residual, active, *correction), query, key, value, bias, attn_mask,
        (seed, None, None), numbers, needs, inside,
    )  # fmt: skip


def packed_forward(
    rule: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    numbers: Numbers,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query (total_q, ..., E), key (total_k, ..., E), value (total_k, ..., Ev); what lies between broadcasts.
    bias (total_q or 1, total_k or 1, ...). Returns (out, Z or lse, residual, what lse lost by rounding)."""
    lead = query.shape[1:-1]
    out = query.new_zeros(*query.shape[:-1], value.size(-1))  # rows of no sequence stay 0
    statistic = query.new_zeros(query.shape[:-1], dtype=torch.float32)
    inputs = with_lead(lead, query.movedim(0, -2), key.movedim(0, -2), value.movedim(0, -2), _pairs(bias), None)
    residual = query.new_zeros(residual_shape(lead, query, value, query.size(0), save), dtype=torch.float32)
    correction = statistic.new_zeros((*lead, query.size(0)) if save and rule == SOFTMAX else (0,))
    torch.ops.glomo_cpu.attention_forward(
        rule, *inputs, seed, cu_seqlens_q, cu_seqlens_k, out.movedim(0, -2), statistic.movedim(0, -1),
        unless_empty(residual), None, unless_empty(correction), *numbers,
    )  # fmt: skip
    return out, statistic, residual, correction


def packed_backward(
    rule: int,
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    numbers: Numbers,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and bias."""
    (dout, dstatistic), (out, statistic, residual, *correction) = grad_outputs, outputs
    options = (seed, cu_seqlens_q, cu_seqlens_k)
    gradients = _gradients(
        rule, dout.movedim(0, -2), dstatistic.movedim(0, -1), out.movedim(0, -2), statistic.movedim(0, -1),
        (residual, residual.new_empty(0), *correction), query.movedim(0, -2), key.movedim(0, -2),
        value.movedim(0, -2), _pairs(bias), None, options, numbers, needs, False,
    )  # fmt: skip
    back = [((-2,), (0,))] * 3 + [((-2, -1), (0, 1))]
    return [g.movedim(*m).contiguous() if need else g for g, m, need in zip(gradients, back, needs, strict=True)]


def _pairs(bias: Tensor | None) -> Tensor | None:
    """(..., total_q or 1, total_k or 1) of a packed bias."""
    return None if bias is None else bias.movedim((0, 1), (-2, -1))


def _gradients(
    rule: int,
    dout: Tensor,
    dstatistic: Tensor,
    out: Tensor,
    statistic: Tensor,
    saved: tuple[Tensor, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    options: tuple[Tensor | None, ...],
    numbers: Numbers,
    needs: list[bool],
    inside: bool,
) -> list[Tensor]:
    lead = out.shape[:-2]
    made = [gradient_buffer(t, lead, need, inside=inside) for t, need in zip((query, key, value), needs, strict=False)]
    sums = BiasSums(bias if needs[3] else None, lead, query.size(-2), key.size(-2), query, in_turns=True)
    torch.ops.glomo_cpu.attention_backward(
        rule, dout, dstatistic, out, statistic, *(*map(unless_empty, saved), None)[:3],
        *with_lead(lead, query, key, value, bias, attn_mask), *options, *made, *sums.outputs, *numbers,
    )  # fmt: skip
    return [
        *(summed(g, t, query) for g, t in zip(made, (query, key, value), strict=True)),
        summed(sums.total, bias, query),
    ]
