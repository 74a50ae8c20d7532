"""graph_mix and relu2_graph_mix on Triton, the host's side: the mixture of the graphs and that of their running
products."""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton_chains, triton_mixture
from .triton_mixture import canonical, padded

NAMES = ("graphs", "query", "key", "features", "weights", "chain_weights", "bias")
"""What gets a gradient."""


def forward(
    graphs: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    numbers: tuple[int, int | None, float, float],
) -> tuple[Tensor, Tensor]:
    """(out (M, ..., T, F), 1 / (Z + eps) (B, N, T) of every graph, empty for given graphs); numbers are num_heads,
    diagonal, scale, eps."""
    mix = canonical(graphs, query, key, features, weights, chain_weights, bias, attn_mask, numbers)
    products = inverse = None
    if mix.chain_weights is not None:
        products, inverse = triton_chains.forward(mix)
    out, inverse = triton_mixture.forward(mix, products, inverse)
    return out[..., : mix.width].reshape(out.size(0), *mix.lead, out.size(2), mix.width).contiguous(), inverse


def backward(
    dout: Tensor,
    inverse: Tensor | None,
    graphs: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    features: Tensor,
    weights: Tensor,
    chain_weights: Tensor | None,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    numbers: tuple[int, int | None, float, float],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of NAMES, empty where `needs` says that none is needed."""
    mix = canonical(graphs, query, key, features, weights, chain_weights, bias, attn_mask, numbers)
    wanted = dict(zip(NAMES, needs, strict=True))
    for_weights = dict(weights=wanted["weights"] or wanted["chain_weights"])
    b, n, t, s = mix.sizes
    dout = padded(dout.reshape(dout.size(0), b, t, mix.width))
    dgraphs = features.new_zeros(b, n, t, s) if wanted["graphs"] else None
    parts: list[dict[str, Tensor]] = []
    if mix.chain_weights is not None:
        parts.append(triton_chains.backward(mix, dout, wanted, dgraphs))
    parts.append(triton_mixture.backward(mix, dout, inverse, wanted | for_weights, dgraphs))
    if wanted["chain_weights"]:  # the running products of the first layer are its graphs
        first = parts[-1]["weights"][:, :, : mix.num_heads]
        others = [part.pop("chain_weights") for part in parts[:-1]]
        parts.append(dict(chain_weights=torch.cat([first, *others], -2)))
    if dgraphs is not None:
        parts.append(dict(graphs=dgraphs))
    results = []
    for name, given in zip(NAMES, (graphs, query, key, features, weights, chain_weights, bias), strict=True):
        found = [part[name] for part in parts if name in part]
        if given is None or not wanted[name]:
            results.append(features.new_empty(0))
        else:
            results.append(_as_given(name, sum(found[1:], found[0]), given, mix.lead, mix.width))
    return results


def _as_given(name: str, gradient: Tensor, given: Tensor, lead: torch.Size, width: int) -> Tensor:
    """From canonical shape, (M, B or 1, N, T) for weights and else (B or 1, ...), to the tensor's own."""
    front, tail = (gradient.shape[:1], 2) if "weights" in name else (torch.Size(), 2 if name == "features" else 3)
    if name == "features":
        gradient = gradient[..., :width]
    elif front:
        gradient = gradient.mT
    batch = lead if gradient.size(len(front)) == lead.numel() else (1,) * len(lead)
    gradient = gradient.reshape(*front, *batch, *gradient.shape[gradient.dim() - tail :])
    return gradient.sum_to_size(given.shape).to(given.dtype).contiguous()
