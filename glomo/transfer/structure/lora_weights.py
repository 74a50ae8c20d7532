"""LoRA of modules that do not multiply by their weights themselves (recurrent layers, attention), and the choice of the
LoRA for a module."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glomo.nn.recurrent_dropout import in_one_piece
from glomo.transfer.structure.insertion import Make
from glomo.transfer.structure.lora import ConvLoRA, EmbeddingLoRA, LinearLoRA, LoRA

_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")


class WeightLoRA(LoRA):
    """:class:`LoRA` of any weights by name: during a call of the module W + (alpha / r) B A stands in the place of W,
    which stays the parameter. Nothing of a call is kept after it, so that the module can be copied and saved.

    `nn.LSTM`, `nn.GRU`, `nn.RNN` and attention read their weights past any hook; so it goes for them.

    Raises:
        ValueError: as :class:`LoRA`; or dropout is not 0: there is no input that A alone reads.
    """

    drops = False
    _flat: tuple[list[Any], list[Any]] | None = None

    def attach(self, module: nn.Module) -> None:
        self._handles = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, always_call=True),
        ]

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.merged:
            return
        for name in self.names:
            owner, leaf = _owner(module, name)
            weight = owner._parameters[leaf]
            assert weight is not None
            # an attribute hides the parameter of its name, which stays registered
            owner.__dict__[leaf] = self._sum(name, weight).to(weight.dtype)
        if isinstance(module, nn.RNNBase):
            if self._flat is None:  # else a call was interrupted
                self._flat = module._flat_weights, module._flat_weight_refs
            flat = [getattr(module, name) for name in module._flat_weights_names]
            module._flat_weights = [*(_for_cudnn(flat) if flat[0].is_cuda else flat)]
            # so that the layer takes them for the ones that it has
            module._flat_weight_refs = [weakref.ref(getattr(module, name)) for name in module._flat_weights_names]

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for name in self.names:
            owner, leaf = _owner(module, name)
            owner.__dict__.pop(leaf, None)
        if self._flat is not None:
            module._flat_weights, module._flat_weight_refs = self._flat  # type: ignore[assignment]
            self._flat = None


def lora(
    r: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.0,
    weights: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> Make:
    """For :func:`add`: the :class:`LoRA` of a module.

    .. code-block:: text

        nn.Linear, nn.Conv1d to nn.Conv3d, nn.Embedding            their weight
        nn.LSTM, nn.GRU, nn.RNN, glomo's WeightDropLSTM            all of their matrices
        nn.MultiheadAttention, glomo.nn.MultiheadAttention         all of their projections

    Args:
        r, alpha, dropout, generator: as in :class:`LoRA`; the defaults are PEFT's.
        weights: names of parameters, in place of these: ("in_proj_weight",); then any module will do.

    Raises:
        TypeError: it is none of these modules, and no weights are named.
        ValueError: a name is no parameter of at least two dimensions; an embedding has max_norm, which would change the
            frozen weight; dropout is not 0 where there is no input to drop.
    """

    def make(module: nn.Module, name: str) -> LoRA:
        kind, names = (WeightLoRA, tuple(weights)) if weights is not None else _kind(module, name)
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise ValueError(f"{name!r} has max_norm {module.max_norm}, which changes its weight; None is needed")
        if isinstance(module, nn.Embedding) and dropout:
            raise ValueError(f"dropout is {dropout}, but {name!r} reads ids; 0 is needed")
        return kind({weight: _shape(module, name, weight) for weight in names}, r, alpha, dropout, generator)

    return make


def _kind(module: nn.Module, name: str) -> tuple[type[LoRA], tuple[str, ...]]:
    if isinstance(module, nn.Linear):
        return LinearLoRA, ("weight",)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvLoRA, ("weight",)
    if isinstance(module, nn.Embedding):
        return EmbeddingLoRA, ("weight",)
    if isinstance(module, nn.RNNBase):
        return WeightLoRA, tuple(one for one in module._flat_weights_names if one.startswith("weight"))
    if isinstance(module, nn.MultiheadAttention):
        return WeightLoRA, tuple(one for one in _OF_ATTENTION if getattr(*_owner(module, one)) is not None)
    raise TypeError(
        f"{name!r} is a {type(module).__name__}; LoRA knows Linear, Conv1d to Conv3d, Embedding, LSTM, GRU, RNN and "
        "MultiheadAttention, of another module name the weights="
    )


def _shape(module: nn.Module, name: str, weight: str) -> list[int]:
    parameters = dict(module.named_parameters())
    if weight not in parameters or parameters[weight].dim() < 2:
        what = f"has shape {tuple(parameters[weight].shape)}" if weight in parameters else "is none of its parameters"
        raise ValueError(f"{weight!r} of {name!r} {what}; a parameter of at least two dimensions is needed")
    return list(parameters[weight].shape)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def _for_cudnn(flat: list[Tensor]) -> list[Tensor]:
    """One behind the other in memory, matrices before biases, as cuDNN wants them."""
    order = sorted(range(len(flat)), key=lambda place: flat[place].dim() < 2)
    pieces = dict(zip(order, in_one_piece([flat[place] for place in order]), strict=True))
    return [pieces[place] for place in range(len(flat))]
