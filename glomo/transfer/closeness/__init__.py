"""Staying close to what was learned before: penalties on weights, and on outputs."""

from glomo.transfer.closeness.conservative import ConservativeOutputs, ConservativeParameters, interpolated_targets
from glomo.transfer.closeness.distances import output_distance
from glomo.transfer.closeness.ewc import EWC, OnlineEWC
from glomo.transfer.closeness.fisher import diagonal_fisher
from glomo.transfer.closeness.l2_sp import L2SP
from glomo.transfer.closeness.lwf import LwF, OnlineLwF, lwf_loss
from glomo.transfer.closeness.weight_decay import without_decay

__all__ = [
    "EWC",
    "L2SP",
    "ConservativeOutputs",
    "ConservativeParameters",
    "LwF",
    "OnlineEWC",
    "OnlineLwF",
    "diagonal_fisher",
    "interpolated_targets",
    "lwf_loss",
    "output_distance",
    "without_decay",
]
