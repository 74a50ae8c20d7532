"""Several models as one: ensembles (mean of predictions), soups and exponential averages (mean of weights)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glomo.transfer.divergence import mean_log_probabilities
from glomo.transfer.wide_buffers import WideBuffers


class Ensemble(nn.Module):
    """The mean of several models' probabilities:

    .. code-block:: text

        log((1 / M) sum_m softmax(z_m))

    Its output takes the place of logits: their softmax is the mean.

    Args:
        models: modules with the same inputs and logits (..., K) of one shape. They are held, not copied.

    Raises:
        ValueError: there is no model; in `forward`, logits of different shapes.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("there is no model in the ensemble; at least one is needed")
        self.models = nn.ModuleList(models)

    def forward(self, *inputs: Any) -> Tensor:
        """Log-probabilities (..., K), in fp32 at least."""
        logits = [model(*inputs) for model in self.models]
        if len({one.shape for one in logits}) != 1:
            shapes = ", ".join(str(tuple(one.shape)) for one in logits)
            raise ValueError(f"the models of the ensemble give logits of the shapes {shapes}; one shape is needed")
        return mean_log_probabilities(logits)


def uniform_soup(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the weights of several models that were fine-tuned from the same start:

    .. code-block:: text

        w = (1 / M) sum_m w_m

    Sums are taken in fp64, results have the type and the device of the first state's. Tensors that are not floating
    point, such as BatchNorm's count of batches, are the last state's. The means of BatchNorm's statistics are not the
    statistics of the mean's activations: afterwards compute these anew over training data with
    `torch.optim.swa_utils.update_bn(batches, model)`.

    Args:
        states: state_dicts of one architecture.

    Raises:
        ValueError: there is no state, or one has other names or shapes than the first.

    Source: Wortsman et al., ICML 2022 (uniform soup).
    """
    if not states:
        raise ValueError("there is no state to average; at least one is needed")
    for number, state in enumerate(states[1:], 2):
        _check_same(dict(states[0]), dict(state), "state 1", f"state {number}")
    return {name: _mean([state[name].detach() for state in states]) for name in states[0]}


class ExponentialAverage(AveragedModel):
    """A copy of a model whose weights follow it slowly; as the teacher of a student, a mean teacher:

    .. code-block:: text

        theta' <- a_t theta' + (1 - a_t) theta,     theta' = theta at the start
        a_t = a,    with warm-up min(a, 1 - 1 / (t + 1)),   t = 1, 2, ... the update

    With warm-up it is the plain mean of all weights so far, the first ones included, until a is reached; with a = 1 it
    stays that (stochastic weight averaging of every update).

    Buffers are averaged like parameters if they are floating point (BatchNorm's statistics), else copied. Weights in
    half precision are averaged in fp32, of which the copy holds the rounded values: with a = 0.999 a step is too small
    for bf16, and for an average of fp32 weights that is cast to it later: build it when the model has its type. The
    copy needs no gradients and starts in evaluation mode. The count of updates (`n_averaged`) and the fp32 means are in
    the state_dict.

    It is a `torch.optim.swa_utils.AveragedModel`, and differs from one: that takes the weights of the first update as
    the start, has no warm-up, averages half precision in half precision, averages all buffers (integers too) or none,
    and takes a model with other parameters without a word.

    Args:
        model: what to copy. Call `update_parameters(model)` after every optimizer step, and the average like the model.
        decay: a, from 0 to 1.
        warmup: let the decay begin at 1/2.

    Raises:
        ValueError: decay is not from 0 to 1; in `update_parameters`, a model with other names or shapes.

    Source: Tarvainen & Valpola, NeurIPS 2017; the warm-up is that of their program.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: bool = False) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; a number from 0 (the last weights) to 1 (the first) is needed")
        super().__init__(model)
        self.decay, self.warmup = decay, warmup
        self.requires_grad_(False)
        self.eval()
        self.means = WideBuffers()
        for name, tensor in _tensors(self.module).items():
            if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                self.means.register_buffer(_without_dots(name), tensor.detach().float())

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """One step towards the model's weights."""
        ours, theirs = _tensors(self.module), _tensors(model)
        _check_same(ours, theirs, "the average", "the given model")
        updates = int(self.n_averaged) + 1 if self.warmup else 0
        decay = min(self.decay, 1 - 1 / (updates + 1)) if self.warmup else self.decay
        means = dict(self.means.named_buffers())
        for name, tensor in ours.items():
            mean = means.get(_without_dots(name), tensor)
            new = theirs[name].to(mean.device, mean.dtype)
            if mean.is_floating_point() or mean.is_complex():
                # what is equal stays: constants do not drift, and -inf in a mask does not become NaN
                new = torch.where(mean == new, mean, decay * mean + (1 - decay) * new)
            mean.copy_(new)
            if mean is not tensor:
                tensor.copy_(mean)
        self.n_averaged += 1


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if not (first.is_floating_point() or first.is_complex()):
        return tensors[-1].to(first.device).clone()
    wide = torch.promote_types(first.dtype, torch.float64)
    total = first.to(wide, copy=True)
    for tensor in tensors[1:]:
        total += tensor.to(first.device, wide)
    return (total / len(tensors)).to(first.dtype)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those too that no state_dict has."""
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _without_dots(name: str) -> str:
    """A name that a buffer can have."""
    return name.replace(".", "/")


def _check_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], us: str, them: str) -> None:
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            here, there = (str(tuple(d[name].shape)) if name in d else "absent" for d in (ours, theirs))
            raise ValueError(
                f"{name!r} is {here} in {us} and {there} in {them}; only weights of the same names and shapes have a "
                "mean"
            )
