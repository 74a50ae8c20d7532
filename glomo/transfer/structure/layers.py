"""Layer transfer: some of a network's weights from another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glomo.nn.transformer import LanguageModel, Transformer


@dataclass(frozen=True)
class Transferred:
    """What became of a target's parameters and buffers, by their names in its state_dict."""

    copied: tuple[str, ...]
    new: tuple[str, ...]


@torch.no_grad()
def copy_layers(
    source: nn.Module | Mapping[str, Tensor], target: nn.Module, prefixes: Mapping[str, str]
) -> Transferred:
    """Copy the weights and buffers under some prefixes of a source to those of a target:

    .. code-block:: text

        copy_layers(teacher, student, {"embedding": "embedding", "layers.0": "layers.0", "layers.2": "layers.1"})

    What the target has there and the source has not stays new. Nothing is copied unless all of it fits.

    Args:
        source: a module, or a state_dict.
        target: a module; its dtypes and devices stay.
        prefixes: {in the source: in the target}, dotted names of modules or parameters; "" is all.

    Returns:
        what was copied and what stays new.

    Raises:
        ValueError: a prefix matches nothing; a name that the target lacks, or two shapes that differ; two prefixes give
            one name of the target two values.

    Source: layer transfer as in Yosinski et al., NeurIPS 2014; layers of a deep teacher as in Sanh et al., 2019.
    """
    values = source.state_dict() if isinstance(source, nn.Module) else source
    state = target.state_dict(keep_vars=True)
    origins: dict[str, str] = {}
    for old, new in prefixes.items():
        under = [name for name in values if _is_under(name, old)]
        if not under:
            raise ValueError(f"the source has nothing under {old!r}; it has {_some(values)}")
        for name in under:
            rest = name[len(old) :] if old else f".{name}"
            to = f"{new}{rest}" if new else rest[1:]
            if origins.setdefault(to, name) != name:
                raise ValueError(f"{to!r} of the target would be both {origins[to]!r} and {name!r} of the source")
    for to, name in origins.items():
        if to not in state:
            raise ValueError(f"the source has {name!r}, and the target no {to!r} for it; it has {_some(state)}")
        if values[name].shape != state[to].shape:
            raise ValueError(
                f"{name!r} of the source is {tuple(values[name].shape)}, and {to!r} of the target "
                f"{tuple(state[to].shape)}; the same shape is needed"
            )
    # clones: where a module is its own target, what is read may have been written before
    taken = {to: values[name].clone() if source is target else values[name] for to, name in origins.items()}
    for to, value in taken.items():
        state[to].copy_(value)
    reached = {id(state[to]) for to in taken}
    copied = tuple(name for name in state if id(state[name]) in reached)  # a shared weight by all of its names
    return Transferred(copied, tuple(name for name in state if name not in set(copied)))


def chosen_layers(layers: str, choice: Sequence[int], into: str | None = None) -> dict[str, str]:
    """Prefixes for :func:`copy_layers`: the layers of that choice, in their order, become the first ones of the target.
    `chosen_layers("layers", range(0, 12, 2))` takes every second one of twelve.

    Args:
        layers: dotted name of the list of layers in the source.
        choice: their numbers.
        into: the same in the target; None: called the same.
    """
    return {f"{layers}.{old}": f"{layers if into is None else into}.{new}" for new, old in enumerate(choice)}


def initialise_from_language_model(transformer: Transformer, language_model: LanguageModel) -> Transferred:
    """Start an encoder-decoder from a language model: embeddings, all layers of the encoder, and the decoder's
    self-attention and feed-forward, each with its LayerNorm. The decoder's attention over the encoder stays new, and so
    do layers above the language model's last.

    Returns:
        what was copied and what stays new.

    Raises:
        ValueError: a setting differs that the weights depend on; the sentence has both values.

    Source: Ramachandran, Liu and Le, EMNLP 2017.
    """
    own, given = transformer.config, language_model.config
    for name in ("vocab_size", "dim", "heads", "ff", "norm", "positions"):
        _check_same(name, getattr(own, name), getattr(given, name))
    for name, value in (("max_length", "learned"), ("max_distance", "relative")):
        if own.positions == value:
            _check_same(name, getattr(own, name), getattr(given, name))
    layers = min(own.layers, given.layers)
    for name in ("encoder_attention", "decoder_attention"):
        kinds = own.kinds(name)[:layers], given.kinds("decoder_attention")[:layers]
        _check_same(f"{name} of the first {layers} layers", *(", ".join(kind) for kind in kinds))
    values = {name: value for name, value in language_model.state_dict().items() if not _is_later(name, layers)}
    encoder = {"decoder": "encoder"}
    found = [copy_layers(values, transformer, {**encoder, "embedding": "embedding"})]
    # in the decoder the norm of the attention over the encoder stands between the two
    names = {name: name.replace(".norms.1.", ".norms.2.") for name in values if _is_under(name, "decoder")}
    found.append(copy_layers(values, transformer, names))
    copied = {name for one in found for name in one.copied}
    everything = list(transformer.state_dict())
    return Transferred(
        tuple(name for name in everything if name in copied), tuple(name for name in everything if name not in copied)
    )


def _is_later(name: str, layers: int) -> bool:
    """Whether a weight is of a layer from that number on."""
    prefix = "decoder.layers."
    return name.startswith(prefix) and int(name[len(prefix) :].partition(".")[0]) >= layers


def _is_under(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _check_same(name: str, own: object, given: object) -> None:
    if own != given:
        raise ValueError(
            f"{name} of the Transformer is {own}, and of the language model {given}; they must be the same"
        )


def _some(names: Mapping[str, Tensor]) -> str:
    shown = list(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
