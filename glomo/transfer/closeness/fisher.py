"""The diagonal of the Fisher information: how much what a model says depends on each of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from glomo.nn.precision import at_least_fp32
from glomo.transfer import examples
from glomo.transfer.closeness.per_sample import SquaredGradients
from glomo.transfer.examples import Inputs
from glomo.transfer.modes import evaluating

Labels = Literal["sample", "all", "empirical"]
Logits = Callable[[nn.Module, Any], Tensor]


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    labels: Labels = "sample",
    generator: torch.Generator | None = None,
    logits: Logits | None = None,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of a classifier, or of a language model, on some data:

    .. code-block:: text

        F_i = 1/N sum_n E_y [ (d log p(y | x_n) / d theta_i)^2 ]

    with the gradient of every example squared by itself, in evaluation mode: how the examples are batched does not
    matter. E_y is one of

    - "sample": one y, drawn from the model itself, for each example;
    - "all": all classes, each by its probability: exact, and as many passes as there are classes;
    - "empirical": the label that is given: the empirical Fisher information, which is that of the model only where the
      model fits its data.

    Where an example has many places (examples, ..., K), log p(y | x) is the sum of the log-probabilities of its units,
    each given what really stands before it; "sample" draws each of them.

    Gradients of many examples at once need a model that `torch.func.vmap` can take. What it cannot (nn.GRU and nn.RNN,
    branches on values, kernels that only know `torch.autograd`) is done one example at a time, with the same numbers.

    Args:
        model: returns logits (examples, ..., K). Its gradients, modes and `requires_grad` stay as they are.
        batches: pairs (inputs, labels), labels (examples, ...) of class ids; for "sample" and "all" also inputs alone
            (a tensor, or a dict of them by name). Several inputs are a tuple, in such a pair.
        labels: as above.
        generator: for "sample", on any device; None: one that is seeded with 0. What is drawn for the n-th example
            depends on it alone, not on the batches.
        logits: logits(model, inputs) of a batch, for a model whose `forward` does not return them; called with inputs
            as they stand in the batches.
        ignore_index: where labels are this, nothing is asked, nor drawn.

    Returns:
        {name: F (shape of the parameter)}, in fp32 at least, of every floating-point parameter; frozen ones have a
        Fisher information too, a tied one is there once, one that is not used has zeros.

    Raises:
        ValueError: there is no example; the labels' shape is not that of the logits; a label is no class; labels are
            missing for "empirical"; "all" for outputs of several places.
        TypeError: a batch is neither inputs nor a pair, or the model does not return a tensor.

    Source: Kirkpatrick et al., PNAS 2017; Martens, JMLR 2020 (drawn labels or given ones).
    """
    if labels not in get_args(Labels):
        raise ValueError(f"labels is {labels!r}; 'sample', 'all' or 'empirical' is needed")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    compute = logits or examples.outputs

    def log_likelihood(model: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        return _log_likelihood(compute(model, inputs), targets, ignore_index)

    squares, count = SquaredGradients(model, log_likelihood), 0
    with evaluating(model):
        for batch in batches:
            inputs, given = examples.inputs_and_labels(batch)
            if not examples.count(inputs):
                continue
            with torch.no_grad():
                said = examples.check_tensor(compute(model, inputs))
            given = _checked(given, said, labels, ignore_index)
            for targets, weights in _targets(labels, said, given, generator, ignore_index):
                squares.add(inputs, targets, weights)
            count += len(given)
    if not count:
        raise ValueError("batches hold no example; the Fisher information is a mean over at least 1")
    return {name: total / count for name, total in squares.sums.items()}


def _targets(
    kind: Labels, logits: Tensor, given: Tensor, generator: torch.Generator, ignore: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(labels, weight of each example) of which the squared gradients are summed."""
    ones = torch.ones(len(given), device=given.device)
    if kind == "empirical":
        yield given, ones
    elif kind == "sample":
        yield _drawn(logits, given, generator, ignore), ones
    else:
        probabilities = logits.softmax(-1, dtype=at_least_fp32(logits.dtype))
        for label, weights in enumerate(probabilities.unbind(-1)):
            yield torch.full_like(given, label).where(given != ignore, given), weights


def _drawn(logits: Tensor, given: Tensor, generator: torch.Generator, ignore: int) -> Tensor:
    """Labels from the model, by the inverse of its distribution function; what is drawn for an example depends on the
    generator and on how many places the examples before have."""
    drawn = given.clone().reshape(len(given), -1)
    for row, scores in zip(drawn, logits.reshape(len(given), drawn.size(1), -1), strict=True):
        asked = row != ignore
        cumulated = scores[asked].softmax(-1, dtype=at_least_fp32(logits.dtype)).cumsum(-1)
        uniform = torch.rand(len(cumulated), generator=generator, device=generator.device, dtype=torch.float64)
        # below 1 also after rounding, so that what has no probability is never drawn
        uniform = uniform.to(cumulated).clamp(max=1 - torch.finfo(cumulated.dtype).eps)
        row[asked] = torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True)[:, 0]
    return drawn.reshape(given.shape)


def _log_likelihood(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """log p(y | x) of each example (examples,)."""
    ignored = labels == ignore
    scores = logits.log_softmax(-1, dtype=at_least_fp32(logits.dtype))
    chosen = scores.gather(-1, labels.masked_fill(ignored, 0)[..., None])[..., 0]
    return chosen.masked_fill(ignored, 0.0).reshape(len(labels), -1).sum(1)


def _checked(given: Tensor | None, logits: Tensor, kind: Labels, ignore: int) -> Tensor:
    """The labels on the logits' device, zeros if there are none."""
    if given is None and kind == "empirical":
        raise ValueError("labels is 'empirical' and a batch has none; batches must be pairs (inputs, labels)")
    if given is None:
        given = torch.zeros(logits.shape[:-1], dtype=torch.long)
    if logits.dim() < 2 or given.shape != logits.shape[:-1]:
        raise ValueError(
            f"a batch's labels are {tuple(given.shape)} and the logits {tuple(logits.shape)}; (examples, ...) and "
            "(examples, ..., classes) are needed"
        )
    if kind == "all" and logits.dim() > 2:
        raise ValueError(
            f"labels is 'all' and the logits are {tuple(logits.shape)}; (examples, classes) is needed, or 'sample'"
        )
    asked, classes = given[given != ignore], logits.size(-1)
    if kind == "empirical" and asked.numel() and not 0 <= int(asked.min()) <= int(asked.max()) < classes:
        raise ValueError(
            f"labels are from {int(asked.min())} to {int(asked.max())}; the model has the classes 0 to {classes - 1}"
        )
    return given.to(logits.device)
