"""What to train and when: techniques of fine-tuning, each usable in a loop of one's own."""

from glomo.transfer.chain_thaw import chain_thaw
from glomo.transfer.full import full
from glomo.transfer.gradual import gradual_unfreezing
from glomo.transfer.groups import LayerGroup, layer_groups
from glomo.transfer.rates import discriminative_rates, optimizer_groups
from glomo.transfer.scalar_mix import ScalarMix
from glomo.transfer.schedules import SlantedTriangular, schedule, slanted_triangular
from glomo.transfer.sequential import auxiliary_weight, sequential_unfreezing
from glomo.transfer.stages import Stage, trainable_table
from glomo.transfer.top import feature_extraction, freeze_all_but_top

__all__ = [
    "LayerGroup",
    "ScalarMix",
    "SlantedTriangular",
    "Stage",
    "auxiliary_weight",
    "chain_thaw",
    "discriminative_rates",
    "feature_extraction",
    "freeze_all_but_top",
    "full",
    "gradual_unfreezing",
    "layer_groups",
    "optimizer_groups",
    "schedule",
    "sequential_unfreezing",
    "slanted_triangular",
    "trainable_table",
]
