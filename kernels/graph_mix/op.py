"""graph_mix: argument checks, the registered op, the public function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import (
    accumulator_dtype,
    autocast_cast,
    check_count,
    check_floating,
    check_last,
    check_rank,
    shape_of,
)
from ..backend import select_backend
from ..registration import differentiable_op
from . import blocked, cpu, reference, triton

Weights = Tensor | Sequence[Tensor]


def canonical_weights(name: str, weights: Weights, lead: torch.Size, num_targets: int, like: Tensor, n: int) -> Tensor:
    """(M, ..., T or 1, N) in the accumulator's dtype, with as many leading dimensions as `lead`, from a tensor or a
    tuple of M tensors, each (N,), (..., N) or per target (..., T, N)."""
    if not isinstance(weights, (Tensor, list, tuple)):
        raise TypeError(f"{name} must be a tensor or a tuple of tensors, not {type(weights).__name__}.")
    several = not isinstance(weights, Tensor)
    canonical = []
    for index, w in enumerate(weights if several else (weights,)):
        label = f"{name}[{index}]" if several else name
        given = w
        if not isinstance(w, Tensor):
            raise TypeError(f"{label} must be a tensor, not {type(w).__name__}.")
        if not w.is_floating_point():
            raise TypeError(f"{label} must be a floating-point tensor, not {w.dtype}.")
        if w.device != like.device:
            raise ValueError(f"{label} is on {w.device}, but must be on {like.device}.")
        if w.dim() == 1:
            w = w[(None,) * (len(lead) + 1)]
        elif w.dim() == len(lead) + 1:
            w = w.unsqueeze(-2)
        shape = (*lead, num_targets, n)
        if (
            w.dim() != len(shape)
            or w.size(-1) != n
            or any(a not in (1, b) for a, b in zip(w.shape, shape, strict=True))
        ):
            raise ValueError(
                f"{label} has shape {shape_of(given)}, but must be (N,) = ({n},), (..., N) = {(*lead, n)} or "
                f"per target (..., T, N) = {shape}."
            )
        canonical.append(w.to(accumulator_dtype(like.dtype)))
    if not canonical:
        raise ValueError(f"{name} is an empty tuple, but needs a tensor for every mixture.")
    return torch.stack(torch.broadcast_tensors(*canonical))


def canonical_mixtures(
    weights: Weights,
    chain_weights: Weights | None,
    lead: torch.Size,
    num_targets: int,
    num_sources: int,
    like: Tensor,
    n: int,
    num_heads: int,
) -> tuple[Tensor, Tensor | None]:
    """weights and chain_weights as (M, ..., T or 1, N), after the checks that both mixes share."""
    check_count("num_heads", num_heads, 1)
    if n == 0:
        raise ValueError("there are no graphs: N is 0, but must be at least 1.")
    if n % num_heads:
        raise ValueError(f"num_heads is {num_heads}, but must divide the number of graphs, {n}.")
    w = canonical_weights("weights", weights, lead, num_targets, like, n)
    if chain_weights is None:
        return w, None
    if num_targets != num_sources:
        raise ValueError(f"chain_weights need square graphs, but T is {num_targets} and S is {num_sources}.")
    if isinstance(weights, Tensor) != isinstance(chain_weights, Tensor):
        raise TypeError("weights and chain_weights must both be tensors, or both tuples of tensors.")
    c = canonical_weights("chain_weights", chain_weights, lead, num_targets, like, n)
    if c.size(0) != w.size(0):
        raise ValueError(f"chain_weights holds {c.size(0)} mixtures, but weights {w.size(0)}.")
    return w, c


def common_lead(**shapes: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"The leading dimensions must broadcast, but they are: {listed}.") from None


def _fake(graphs, features, weights, chain_weights, num_heads):
    lead = torch.broadcast_shapes(graphs.shape[:-3], features.shape[:-2])
    return features.new_empty(weights.size(0), *lead, graphs.size(-2), features.size(-1))


_blocked = differentiable_op(
    "graph_mix_blocked",
    blocked.graph_mix_forward,
    blocked.graph_mix_backward,
    _fake,
    differentiable=("graphs", "features", "weights", "chain_weights"),
)

_cpu = differentiable_op(
    "graph_mix_cpu",
    cpu.graph_mix_forward,
    cpu.graph_mix_backward,
    _fake,
    differentiable=("graphs", "features", "weights", "chain_weights"),
)

_triton = differentiable_op(
    "graph_mix_triton",
    triton.graph_mix_forward,
    triton.graph_mix_backward,
    _fake,
    differentiable=("graphs", "features", "weights", "chain_weights"),
)

_BACKENDS = {"reference": reference.graph_mix, "blocked": _blocked, "cpu": _cpu, "triton": _triton}


def graph_mix(
    graphs: Tensor,
    features: Tensor,
    weights: Weights,
    chain_weights: Weights | None = None,
    *,
    num_heads: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """A mixture of layer graphs, and of their running products, times features.

    .. code-block:: text

        Lambda[1, h] = A[1, h],   Lambda[l, h] = A[l, h] Lambda[l-1, h]      (matrix products, within a head)
        out = sum_n weights[n] A[n] F + sum_n chain_weights[n] Lambda[n] F

    Running products are formed as matrices only where that is cheaper, on the CPU for short sequences; else they are
    products with the features, Lambda[l, h] F = A[l, h] (Lambda[l-1, h] F).

    Args:
        graphs: (..., N, T, S), N = layers * num_heads, layer-major; row t holds the weights of target t.
        features: (..., S, E), of the graphs' dtype.
        weights: (N,), or per batch (..., N), or per target (..., T, N) (dimensions of size 1 broadcast), or a tuple of
            M such tensors.
        chain_weights: the same for the running products, which need T = S; None leaves them out.
        num_heads: heads of a layer; chains run within a head.

    Returns:
        (..., T, E) of the features' dtype; a tuple of M of them if weights is a tuple.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape; the sentence names it.

    Source: the mixed graph of Yang et al., "GLoMo: Unsupervised Learning of Transferable Relational Graphs",
    NeurIPS 2018.
    """
    graphs, features = autocast_cast(graphs, features)
    check_floating(graphs=graphs, features=features)
    check_rank(3, "(..., N, T, S)", graphs=graphs)
    check_rank(2, "(..., S, E)", features=features)
    n, num_targets, num_sources = graphs.shape[-3:]
    check_last("features", features, -2, num_sources, "the graphs' sources")
    lead = common_lead(graphs=graphs.shape[:-3], features=features.shape[:-2])
    w, c = canonical_mixtures(weights, chain_weights, lead, num_targets, num_sources, features, n, num_heads)
    run = _BACKENDS[select_backend("graph_mix", graphs, features)]
    out: Tensor = run(graphs, features, w, c, num_heads)
    return out[0] if isinstance(weights, Tensor) else out.unbind()
