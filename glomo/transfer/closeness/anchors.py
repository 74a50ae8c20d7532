"""What the penalties on weights share: a model's weights, and the ones from before, their anchors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from glomo.nn.precision import at_least_fp32
from glomo.transfer.wide_buffers import WideBuffers

Choice = Callable[[str, nn.Parameter], bool]
"""(name, parameter) -> whether it is penalised."""


class AnchoredPenalty(WideBuffers):
    """A penalty on how far a model's weights are from their anchors. `forward()` takes nothing and returns the scalar
    to be added to the loss.

    The anchors are buffers (`anchors.<name of the parameter>`): they move with `.to()`, which makes them no narrower
    (`.half()` either), are in the state_dict, and come back by `load_state_dict` on a penalty that is freshly built.
    The model is no child: its parameters are neither in the penalty's state_dict nor in its `parameters()`. To copy
    both, copy them together: `copy.deepcopy((model, penalty))`.

    Args:
        model: whose parameters are penalised. They are looked up by their names at every call.
        anchors: {name of a parameter: its anchor}.

    Raises:
        ValueError: there are no anchors.
    """

    def __init__(self, model: nn.Module, anchors: Mapping[str, Tensor]) -> None:
        super().__init__()
        if not anchors:
            count = sum(1 for _ in model.parameters())
            raise ValueError(f"none of the model's {count} parameters is penalised; at least 1 is needed")
        self._held = (model,)  # in a tuple it is no child, and is still copied along with the penalty
        self.names = tuple(anchors)
        self.anchors = tensor_tree(anchors)

    def penalised(self) -> dict[str, nn.Parameter]:
        """{name: parameter of the model}, each once.

        Raises:
            ValueError: one of them is gone, or of another shape or on another device than its anchor, or sharded.
        """
        return {name: self._checked(name, self.anchors.get_buffer(name)) for name in self.names}

    def factors(self) -> dict[str, float]:
        """{name: what the square of its difference counts, but for a factor above 0}; 1 for all unless a penalty says
        otherwise."""
        return dict.fromkeys(self.names, 1.0)

    def pulled(self) -> dict[str, nn.Parameter]:
        """Those of `penalised` whose factor is not 0.

        Raises:
            ValueError: as for `penalised`.
        """
        factors = self.factors()
        return {name: parameter for name, parameter in self.penalised().items() if factors[name]}

    def differences(self) -> Iterator[tuple[str, Tensor]]:
        """(name, w - w_0) of every penalised parameter, in fp32 at least.

        Raises:
            ValueError: as for `penalised`.
        """
        for name, parameter in self.penalised().items():
            dtype = at_least_fp32(parameter.dtype)
            yield name, parameter.to(dtype) - self.anchors.get_buffer(name).to(dtype)

    def _checked(self, name: str, anchor: Tensor) -> nn.Parameter:
        """The parameter of the name."""
        try:
            parameter = self._held[0].get_parameter(name)
        except AttributeError:
            raise ValueError(
                f"the model has no parameter {name!r} any more; build the penalty again after the model has changed"
            ) from None
        check_whole(name, parameter)
        if parameter.shape != anchor.shape:
            raise ValueError(
                f"parameter {name!r} is {tuple(parameter.shape)} and its anchor {tuple(anchor.shape)}; build the "
                "penalty again after the model has changed"
            )
        if parameter.device != anchor.device:
            raise ValueError(
                f"parameter {name!r} is on {parameter.device} and its anchor on {anchor.device}; move the penalty "
                "along with the model"
            )
        return parameter


def tensor_tree(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module whose buffers have the given dotted names, with detached copies of the tensors."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_buffer(last, tensor.detach().clone())
    return root


def chosen_parameters(model: nn.Module, on: Choice | None) -> dict[str, nn.Parameter]:
    """{name: parameter} for which `on` says yes (none: all), a tied one once, by its first name.

    Raises:
        ValueError: one of them is sharded.
    """
    found = {name: p for name, p in model.named_parameters() if on is None or on(name, p)}
    for name, parameter in found.items():
        check_whole(name, parameter)
    return found


def check_whole(name: str, parameter: nn.Parameter) -> None:
    """Raises ValueError for a DTensor (FSDP2)."""
    if hasattr(parameter, "full_tensor"):  # without the import of its class, which takes a second
        raise ValueError(
            f"parameter {name!r} is a DTensor {tuple(parameter.shape)}, of which each process holds a part; a penalty "
            "needs the whole parameter: do not shard what is penalised"
        )


def check_factor(name: str, value: float) -> float:
    """Raises ValueError unless it is at least 0 and finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; a finite number of at least 0 is needed")
    return value
