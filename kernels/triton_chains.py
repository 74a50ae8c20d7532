"""The running products of graph_mix and relu2_graph_mix on Triton, the host's side: X_l = A_l X_{l-1} within a head, by
the kernels of relu2_attention, or for given graphs by PyTorch's matrix product.

Heads are taken a few at a time, so that only their products are in memory; the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import triton_attention
from .configurations import Configuration
from .launch import Launch, is_wide
from .triton_backward import score_gradients
from .triton_mixture import Mix, first_of, operand

PROGRAMS = 512
"""Blocks of threads that keep a large GPU busy: heads are taken together up to it."""
_TILE = Configuration(32, 0, 64, 4, 1)


def _heads(mix: Mix) -> Iterator[slice]:
    b, _, t, _ = mix.sizes
    together = max(1, -(-PROGRAMS // max(b * ((t + 63) // 64), 1)))
    for first in range(0, mix.num_heads, together):
        yield slice(first, min(first + together, mix.num_heads))


def _layers(mix: Mix, heads: slice) -> list[slice]:
    """The graphs of the heads, layer by layer."""
    return [slice(n + heads.start, n + heads.stop) for n in range(0, mix.sizes[1], mix.num_heads)]


def _part(t: Tensor | None, graphs: slice, broadcasts: bool = False) -> Tensor | None:
    """Those graphs of a tensor (B, N, ...), or of one that may broadcast over them."""
    return t if t is None or (broadcasts and t.size(1) == 1) else t[:, graphs]


def _inputs(mix: Mix, graphs: slice) -> tuple[Tensor | None, ...]:
    """query, key, bias and mask."""
    pair = (_part(mix.query, graphs), _part(mix.key, graphs))
    return *pair, _part(mix.bias, graphs, True), _part(mix.mask, graphs, True)


def _weights(mix: Mix, graphs: slice) -> Tensor:
    """(M, B, heads, T) of the running products that end with these graphs, of a layer above the first."""
    assert mix.chain_weights is not None
    return mix.chain_weights[:, :, graphs.start - mix.num_heads : graphs.stop - mix.num_heads]


def _step(mix: Mix, graphs: slice, value: Tensor, inverse: Tensor | None) -> Tensor:
    """X_l (B, heads, T, F) from X_{l-1}; 1 / (Z + eps) of these graphs goes to inverse."""
    b, _, t, _ = mix.sizes
    if mix.graphs is not None:
        return mix.graphs[:, graphs] @ value
    query, key, bias, mask = _inputs(mix, graphs)
    out = value.new_empty(b, graphs.stop - graphs.start, t, value.size(-1))
    outputs = dict(out=out, inverse=_part(inverse, graphs))
    triton_attention.attend(out.shape[:2], (query, key, value, bias, mask), outputs, mix.attention_numbers)
    return out


def forward(mix: Mix) -> tuple[Tensor, Tensor | None]:
    """(sum_n c_n X_n (M, B, T, F) in fp32 over the layers above the first, 1 / (Z + eps) of every graph)."""
    b, _, t, _ = mix.sizes
    total = mix.features.new_zeros(mix.weights.size(0), b, t, mix.features.size(-1), dtype=torch.float32)
    inverse = None if mix.graphs is not None else mix.row_numbers()
    for heads in _heads(mix):
        states = mix.features[:, None]
        for level, graphs in enumerate(_layers(mix, heads)):
            states = _step(mix, graphs, states, inverse)
            if level:
                _add_layer(mix, graphs, states, total)
    return total, inverse


def backward(mix: Mix, dout: Tensor, needs: dict[str, bool], dgraphs: Tensor | None) -> dict[str, Tensor]:
    """Gradients by the names of the inputs, in canonical shape, of chain_weights (M, B, N - heads, T); dgraphs
    (B, N, T, S) is filled."""
    gradients: dict[str, Tensor] = {}
    for name in ("query", "key", "bias"):
        given = getattr(mix, name)
        if needs[name]:
            gradients[name] = torch.zeros(given.shape, dtype=torch.float32, device=given.device)
    dweights = mix.row_numbers(mix.weights.size(0))[:, :, mix.num_heads :] if needs["chain_weights"] else None
    dfeatures = None
    if needs["features"]:
        dfeatures = gradients["features"] = mix.features.new_zeros(mix.features.shape, dtype=torch.float32)
    inverse = None if mix.graphs is not None else mix.row_numbers()
    below = any(needs[name] for name in ("graphs", "query", "key", "bias", "features"))  # what takes a layer's dX
    for heads in _heads(mix):
        layers, states = _layers(mix, heads), [mix.features[:, None]]
        for graphs in layers:
            states.append(_step(mix, graphs, states[-1], inverse))
        above: Tensor | None = None
        for level in reversed(range(len(layers))):
            graphs = layers[level]
            state, before = states.pop(), states[level]
            last = level == 0
            if last and not below:
                break
            dstate, units = _layer_gradient(mix, graphs, state, None if last else dout, above, dweights)
            wanted = needs["features"] or (below and not last)
            if mix.graphs is not None:
                a, d = mix.graphs[:, graphs], dstate if units is None else dstate.float() * units[..., None]
                if dgraphs is not None:
                    dgraphs[:, graphs] = (d @ before.mT.to(d.dtype)).to(dgraphs.dtype)
                above = a.mT.to(d.dtype) @ d if wanted else None
            else:
                query, key, bias, mask = _inputs(mix, graphs)
                assert query is not None and key is not None and inverse is not None
                rows = dict(inverse=inverse[:, graphs]) | ({} if units is None else dict(factors=units))
                dquery, dkey, above, dbias = score_gradients(
                    dstate, state, rows, query, key, before, bias, mask, None,
                    mix.attention_numbers, [needs["query"], needs["key"], wanted, needs["bias"]],
                    value_dtype=torch.float32,
                )  # fmt: skip
                for name, gradient in (("query", dquery), ("key", dkey), ("bias", dbias)):
                    if needs[name]:
                        total = _part(gradients[name], graphs, broadcasts=True)
                        assert total is not None
                        total += gradient
            if last and dfeatures is not None and above is not None:
                dfeatures += above.sum(1).sum_to_size(dfeatures.shape)
    if dweights is not None:
        gradients["chain_weights"] = dweights
    return gradients


def _grid(mix: Mix, across: int) -> tuple[int, int]:
    """(tiles of targets, programs)."""
    b, _, t, _ = mix.sizes
    tiles = (t + _TILE.M - 1) // _TILE.M
    return tiles, tiles * b * across


def _add_layer(mix: Mix, graphs: slice, states: Tensor, total: Tensor) -> None:
    """total_m += sum_h c_mh X_h."""
    from .device.chains import add_layer_kernel

    everything = slice(0, mix.weights.size(0))
    features = states.size(-1)
    tiles, programs = _grid(mix, max((features + _TILE.features - 1) // _TILE.features, 1))
    weights, weights_step = first_of(_weights(mix, graphs), everything, 1)
    out, out_step = first_of(total, everything)
    views = dict(states=operand(states), weights=weights, out=out)
    numbers = dict(
        weights_step=weights_step,
        out_step=out_step,
        num_heads=graphs.stop - graphs.start,
        batches=mix.sizes[0],
        T=mix.sizes[2],
        tiles=tiles,
    )
    Launch(add_layer_kernel, programs, views | numbers, _constants(mix, views), _TILE).run()


def _layer_gradient(
    mix: Mix, graphs: slice, states: Tensor, dout: Tensor | None, above: Tensor | None, dweights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(dX_l, in fp16 divided by units of its rows, the units (B, heads, T) or None). Without dout, of the first layer,
    all comes from above."""
    from .device.chains import layer_gradient_kernel

    everything = slice(0, mix.weights.size(0))
    dstates, units = torch.empty_like(states), None
    if states.dtype == torch.float16:
        units = torch.empty(states.shape[:3], dtype=torch.float32, device=states.device)
    tiles, programs = _grid(mix, graphs.stop - graphs.start)
    weights = part = None
    if dout is not None:
        weights = _weights(mix, graphs)
        if dweights is not None:
            part = dweights[:, :, graphs.start - mix.num_heads : graphs.stop - mix.num_heads]
    cotangent, dout_step = first_of(dout, everything)
    views = dict(
        states=operand(states),
        dout=cotangent,
        weights=first_of(weights, everything, 1)[0],
        above=operand(above),
        dstates=operand(dstates),
        units=operand(units, 1),
        dweights=first_of(part, everything, 1)[0],
    )
    numbers = dict(
        weights_step=0 if weights is None else weights.stride(0),
        dout_step=dout_step,
        dweights_step=0 if part is None else part.stride(0),
        num_heads=graphs.stop - graphs.start,
        T=mix.sizes[2],
        tiles=tiles,
    )
    constants = _constants(mix, views) | dict(MIXTURES=0 if dout is None else mix.weights.size(0))
    Launch(layer_gradient_kernel, programs, views | numbers, constants, _TILE).run()
    return dstates, units


def _constants(mix: Mix, views: dict) -> dict[str, int]:
    return dict(
        FEATURES=mix.features.size(-1),
        MIXTURES=mix.weights.size(0),
        M=_TILE.M,
        F=_TILE.features,
        WIDE=is_wide(views.values(), _TILE.M, _TILE.features),
    )
