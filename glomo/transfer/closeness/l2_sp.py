"""L2-SP: weight decay towards the source's weights, the starting point."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glomo.transfer.closeness.anchors import AnchoredPenalty, Choice, check_factor, chosen_parameters


class L2SP(AnchoredPenalty):
    """The penalty

    .. code-block:: text

        Omega(w) = alpha / 2 ||w_S - w_S^0||^2 + beta / 2 ||w_new||^2

    with w_S the weights that the source has too, w_S^0 their values there, and w_new those that it lacks. Take what is
    penalised out of the optimizer's weight decay: `without_decay`.

    Which weights are new is in the state_dict as well (`new`, and an anchor of zero): `L2SP(model)` and
    `load_state_dict` bring the anchors back, without the source (alpha, beta and on are the caller's to give again).

    Args:
        model: whose weights are penalised.
        source: a state_dict. What it has must fit; leave a head out that is to be new. None: the model's present
            weights, and nothing is new.
        alpha, beta: as above.
        on: (name, parameter) -> whether it is penalised; None: weights only (`is_weight`).

    Raises:
        TypeError: source is no mapping.
        ValueError: the source has another shape for a weight, or none of the weights; alpha or beta is negative;
            nothing is penalised.

    Source: Li, Grandvalet and Davoine, ICML 2018, section 3; alpha and beta as in the authors' experiments.
    """

    new: Tensor

    def __init__(
        self,
        model: nn.Module,
        source: Mapping[str, Tensor] | None = None,
        alpha: float = 0.1,
        beta: float = 0.01,
        on: Choice | None = None,
    ) -> None:
        chosen = chosen_parameters(model, on or (lambda name, parameter: is_weight(model, name, parameter)))
        found: Mapping[str, Tensor] = chosen if source is None else _found(model, chosen, source)
        super().__init__(model, {name: found.get(name, torch.zeros_like(p)) for name, p in chosen.items()})
        self.alpha, self.beta = check_factor("alpha", alpha), check_factor("beta", beta)
        device = next(iter(chosen.values())).device
        self.register_buffer("new", torch.tensor([name not in found for name in chosen], device=device))

    def factors(self) -> dict[str, float]:
        return {name: self.beta if new else self.alpha for name, new in zip(self.names, self.new.tolist(), strict=True)}

    def forward(self) -> Tensor:
        """Omega, a scalar."""
        squares = torch.stack([difference.square().sum() for _, difference in self.differences()])
        factors = torch.where(self.new, torch.full_like(squares, self.beta), torch.full_like(squares, self.alpha))
        return (factors * squares).sum() / 2


def is_weight(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a weight: at least two dimensions, not called a bias, not of a normalisation."""
    path, _, last = name.rpartition(".")
    normalises = isinstance(model.get_submodule(path), nn.LayerNorm | nn.RMSNorm)
    return parameter.dim() >= 2 and "bias" not in last and not normalises


def _found(model: nn.Module, chosen: Mapping[str, nn.Parameter], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name: the source's weight} of those that it has, under any of their names."""
    if not isinstance(source, Mapping):
        raise TypeError(f"source is a {type(source).__name__}; a state_dict is needed (source.state_dict())")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = {}
    for name, parameter in chosen.items():
        known = next((alias for alias in names[id(parameter)] if alias in source), None)
        if known is None:
            continue
        if source[known].shape != parameter.shape:
            raise ValueError(
                f"{name!r} is {tuple(parameter.shape)} in the model and {tuple(source[known].shape)} in the source; "
                "leave it out of the source if it is to be new"
            )
        found[name] = source[known].to(parameter)
    if chosen and not found:
        raise ValueError(
            f"the source has none of the model's weights: the model has {_some(chosen)}, the source {_some(source)}; "
            "a state_dict of the same architecture is needed"
        )
    return found


def _some(names: Mapping[str, Tensor]) -> str:
    some = ", ".join(list(names)[:3])
    return f"{some}, ..." if len(names) > 3 else some or "nothing"
