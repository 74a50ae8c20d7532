"""Adapters into the weights of their modules, and out of them."""

from __future__ import annotations

from torch import nn

from glomo.nn.awd_lstm import LSTMLanguageModel
from glomo.nn.embedded import Embedded
from glomo.transfer.structure.insertion import adapters, take_out


def merge(model: nn.Module, keep: bool = True) -> None:
    """Put what adapters do into the weights of their modules, where that can be (LoRA, parallel residual adapters);
    other adapters stay as they are. The merged weights are rounded once, to their own dtype.

    A weight that several modules share is replaced in the adapter's module alone, so that they share it no longer.

    Args:
        keep: keep the original weights, in the adapters and in the state_dict, for :func:`unmerge`. False: for good;
            the adapters are taken out, and the state_dict has the base model's keys.

    Raises:
        ValueError: no adapter can be merged; a weight with an adapter on its lookups is read for logits as well
            (`glomo.nn`'s language models do), which merging would change.
    """
    placed = [one for one in adapters(model) if one.adapter.mergeable]
    if not placed:
        raise ValueError("there is no adapter that can be merged into its module's weights")
    _refuse_logits(model)
    for one in placed:
        one.adapter.merge_into(one.module)
    if not keep:
        take_out(model, placed)


def unmerge(model: nn.Module) -> None:
    """Give the modules their original weights back, the same to the bit, and let the adapters work beside them."""
    for one in reversed(adapters(model)):  # what was merged last is on top
        one.adapter.restore(one.module)


def _refuse_logits(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LSTMLanguageModel):
            read = module.encoder.embedding
        elif isinstance(module, Embedded):
            read = module.embedding
        else:
            continue
        if any(one.adapter.mergeable for one in adapters(read) if one.module is read):
            raise ValueError(
                f"the embedding of {name or 'the model'!r} has an adapter on what it looks up, and its weight makes "
                "the logits as well; it cannot be merged without changing them"
            )
