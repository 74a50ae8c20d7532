"""Zero-shot by embeddings: inputs f(x) and labels g(y) in one space, where an input is near its label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.nn.precision import wide


def label_scores(inputs: Tensor, labels: Tensor, cosine: bool = False) -> Tensor:
    """How near each input is to each label, (B, C):

    .. code-block:: text

        f(x) . g(y),     or with cosine f(x) . g(y) / (||f(x)|| ||g(y)||), 0 for a vector of zeros

    The label with the highest score, among seen, unseen or all ones, is the answer.

    Args:
        inputs: (B, dim).
        labels: (C, dim).

    Raises:
        ValueError: other shapes.
    """
    if inputs.dim() != 2 or labels.dim() != 2 or inputs.size(1) != labels.size(1):
        raise ValueError(f"{_shapes(inputs, labels)}; (inputs, dim) and (labels, dim) are needed")
    with torch.autocast(inputs.device.type, enabled=False):
        inputs, labels = wide(inputs), wide(labels)
        if cosine:
            inputs, labels = F.normalize(inputs, dim=1), F.normalize(labels, dim=1)
        return inputs @ labels.to(inputs.dtype).T


def max_hinge_loss(inputs: Tensor, labels: Tensor, classes: Tensor, margin: float = 1.0) -> Tensor:
    """The mean over a batch of

    .. code-block:: text

        max(0, margin - f(x^n) . g(y^n) + max_{m: y^m != y^n} f(x^n) . g(y^m))

    Zero exactly where an example's own label beats every other of the batch by the margin. Examples of the same class
    are no negatives of each other; one without a negative counts 0.

    Args:
        inputs: f(x), (B, dim).
        labels: g(y), (B, dim): the label of each example.
        classes: (B,): which class each example is of.
        margin: above 0; the formula's k.

    Raises:
        ValueError: other shapes, no example, or a margin that is not above 0.

    Source: Lee, lectures on machine learning, "Transfer Learning" (National Taiwan University).
    """
    if inputs.shape != labels.shape or classes.shape != inputs.shape[:1] or not inputs.numel():
        raise ValueError(
            f"{_shapes(inputs, labels)}, classes {tuple(classes.shape)}; (B, dim), (B, dim) and (B,) with at least 1 "
            "example are needed"
        )
    _check_margin(margin)
    scores = label_scores(inputs, labels)
    same = classes[:, None] == classes
    nearest = scores.masked_fill(same, -torch.inf).amax(1)
    return F.relu(margin - scores.diagonal() + nearest).mean()


def devise_loss(inputs: Tensor, labels: Tensor, targets: Tensor, margin: float = 0.1) -> Tensor:
    """DeViSE's hinge rank loss, the mean over a batch of

    .. code-block:: text

        sum_{j != y} max(0, margin - t_y . M v + t_j . M v),     ||t_j|| = 1

    It adds up all wrong labels that come too near, where `max_hinge_loss` takes the nearest.

    Args:
        inputs: M v, (B, dim): the features through a linear map.
        labels: (C, dim): a vector for each label of the training; their lengths are made 1 here.
        targets: (B,): row of each example's label.
        margin: above 0.

    Raises:
        ValueError: other shapes, no example, or a margin that is not above 0.

    Source: Frome et al., NIPS 2013, equation 1.
    """
    if targets.shape != inputs.shape[:1] or not inputs.numel():
        raise ValueError(
            f"{_shapes(inputs, labels)}, targets {tuple(targets.shape)}; one target for each input, and at least 1, "
            "are needed"
        )
    _check_margin(margin)
    scores = label_scores(inputs, F.normalize(wide(labels), dim=-1))
    own = scores.gather(1, targets[:, None])
    wrong = torch.ones_like(scores, dtype=torch.bool).scatter(1, targets[:, None], False)
    return (F.relu(margin - own + scores) * wrong).sum(1).mean()


def pull_loss(inputs: Tensor, labels: Tensor) -> Tensor:
    """A loss that does not work where both sides learn, to be shown:

    .. code-block:: text

        ||f(x^n) - g(y^n)||^2, the mean over a batch

    It only pulls, so that one point for everything is its best answer: the embeddings collapse and nothing can be told
    apart. `max_hinge_loss` and `devise_loss` also push others away. With labels that are fixed it is a regression.

    Args:
        inputs: (B, dim).
        labels: (B, dim).

    Raises:
        ValueError: other shapes, or no example.

    Source: Lee, lectures on machine learning, "Transfer Learning" (National Taiwan University).
    """
    if inputs.dim() != 2 or inputs.shape != labels.shape or not inputs.numel():
        raise ValueError(f"{_shapes(inputs, labels)}; two times (B, dim) with at least 1 example are needed")
    return (wide(inputs) - wide(labels)).square().sum(1).mean()


def _shapes(inputs: Tensor, labels: Tensor) -> str:
    return f"inputs have the shape {tuple(inputs.shape)} and labels {tuple(labels.shape)}"


def _check_margin(margin: float) -> None:
    if not margin > 0:
        raise ValueError(f"margin is {margin}; above 0 is needed")
