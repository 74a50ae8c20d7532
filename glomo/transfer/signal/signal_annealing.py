"""Training signal annealing: few labelled examples are let go once the model is sure of them."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from glomo.transfer.divergence import check_labels, log_probabilities, mean_or_zero


def tsa_threshold(step: int, steps: int, classes: int, schedule: Literal["linear", "exp", "log"] = "linear") -> float:
    """How sure the model may be of a labelled example at a step counted from 0:

    .. code-block:: text

        eta = a (1 - 1/K) + 1/K
        a   = t / T                 "linear"
              exp(5 (t / T - 1))    "exp": the labels are let out late; for models that overfit them soon
              1 - exp(-5 t / T)     "log": early

    After step T it stays as it is at T.

    Raises:
        ValueError: a step below 0, or no steps; fewer than 2 classes; an unknown schedule.

    Source: Xie et al., NeurIPS 2020 (UDA), training signal annealing.
    """
    if step < 0 or steps < 1:
        raise ValueError(f"step is {step} of {steps}; steps are counted from 0, and at least 1 is needed")
    if classes < 2:
        raise ValueError(f"classes is {classes}; at least 2 are needed")
    done = min(1.0, step / steps)
    if schedule == "linear":
        a = done
    elif schedule == "exp":
        a = math.exp(5 * (done - 1))
    elif schedule == "log":
        a = 1 - math.exp(-5 * done)
    else:
        raise ValueError(f"schedule is {schedule!r}; 'linear', 'exp' or 'log' is needed")
    return a * (1 - 1 / classes) + 1 / classes


def tsa_loss(logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """The cross-entropy, as a mean over the examples of which the model is not too sure:

    .. code-block:: text

        sum_b [p_b(y_b) <= eta] CE_b / max(1, sum_b [p_b(y_b) <= eta])

    Zero where none is left.

    Args:
        logits: (..., K).
        labels: (...) int64.
        threshold: eta, of `tsa_threshold`.

    Raises:
        ValueError: shapes that do not fit.

    Source: Xie et al., NeurIPS 2020 (UDA), training signal annealing.
    """
    check_labels(labels, logits)
    entropy = F.cross_entropy(log_probabilities(logits).flatten(0, -2), labels.flatten(), reduction="none")
    return mean_or_zero(entropy[(-entropy.detach()).exp() <= threshold])
