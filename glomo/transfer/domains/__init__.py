"""The same task in another domain: features that do not tell where an example comes from."""

from glomo.transfer.domains.adversarial import DomainAdversary, DomainLoss, joint_features
from glomo.transfer.domains.alignment import coral, mmd
from glomo.transfer.domains.gradient_reversal import (
    DANN_RATE,
    GradientReversal,
    dann_rate_factor,
    dann_weight,
    gradient_reversal,
)
from glomo.transfer.domains.pictures import project

__all__ = [
    "DANN_RATE",
    "DomainAdversary",
    "DomainLoss",
    "GradientReversal",
    "coral",
    "dann_rate_factor",
    "dann_weight",
    "gradient_reversal",
    "joint_features",
    "mmd",
    "project",
]
