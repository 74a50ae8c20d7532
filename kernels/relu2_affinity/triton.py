"""relu2_affinity on Triton, the host's side: outputs, operands and the launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import at_least_2d, broadcast
from ..configurations import block, configuration, precision, weight
from ..launch import (
    Launch,
    Lead,
    TooManyDimensions,
    diagonal_within,
    expand_all,
    is_wide,
    kind_of,
)
from ..triton_backward import score_gradients


def relu2_affinity_forward(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(A, Z)."""
    lead = broadcast(query.shape[:-2], key.shape[:-2])
    affinity = query.new_empty(*lead, query.size(-2), key.size(-2))
    normalizer = torch.empty(affinity.shape[:-1], dtype=torch.float32, device=query.device)
    inputs = [query, key, at_least_2d(bias), at_least_2d(attn_mask)]
    try:
        _launch(lead, inputs, affinity, normalizer, diagonal, scale, eps).run()
    except TooManyDimensions:
        _launch(lead, expand_all(lead, inputs), affinity, normalizer, diagonal, scale, eps).run()
    return affinity, normalizer


def relu2_affinity_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    diagonal: int | None,
    scale: float,
    eps: float,
    *,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key and bias."""
    rows = dict(normalizer=outputs[1], dnormalizer=grad_outputs[1])
    arguments = query, key, None, bias, attn_mask, None, (0.0, diagonal, scale, eps)
    dquery, dkey, _, dbias = score_gradients(grad_outputs[0], None, rows, *arguments, [*needs[:2], False, needs[2]])
    return [dquery, dkey, dbias]


def _launch(
    lead: torch.Size,
    inputs: list[Tensor | None],
    affinity: Tensor,
    normalizer: Tensor,
    diagonal: int | None,
    scale: float,
    eps: float,
) -> Launch:
    from ..device.relu2_affinity import affinity_kernel

    query, key, bias, attn_mask = inputs
    assert query is not None and key is not None
    batches = Lead(lead, [*((t, 2) for t in (*inputs, affinity) if t is not None), (normalizer, 1)])
    width = block(query.size(-1))
    kind = kind_of(bias, scalars=True)
    heavy = weight(diagonal, False, kind, attn_mask is not None, False, query)
    tile = configuration("relu2_affinity", query, block(0), heavy)
    views = [batches.optional(t) for t in (*inputs, affinity)]
    tiles = (query.size(-2) + tile.M - 1) // tile.M
    return Launch(
        affinity_kernel,
        tiles * batches.count,
        dict(
            zip(("query", "key", "bias", "mask", "affinity"), views, strict=True),
            normalizer=batches.operand(normalizer, 1),
            lead=(*batches.sizes[1:], batches.count),
            T=query.size(-2),
            S=key.size(-2),
            tiles=tiles,
            diagonal=diagonal_within(diagonal, query.size(-2), key.size(-2)),
            scale=scale,
            eps=eps,
        ),
        dict(
            WIDTH=query.size(-1),
            CHECK_T=query.size(-2) % tile.M != 0,
            M=tile.M,
            N=tile.N,
            E=width,
            BIAS=kind,
            MASK=kind_of(attn_mask, scalars=False),
            CAUSAL=diagonal is not None,
            SCALE=scale != 1.0,
            PRECISION=precision(query.dtype),
            WIDE=is_wide(views, max(tile.M, tile.N), max(width, tile.N)),
        ),
        tile,
    )
