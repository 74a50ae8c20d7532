"""More signal than the target's labels give: other tasks, teachers, several models, slices, unlabelled examples."""

from glomo.transfer.signal.averaging import Ensemble, ExponentialAverage, uniform_soup
from glomo.transfer.signal.consistency import consistency_loss, consistency_ramp
from glomo.transfer.signal.distillation import distillation_loss
from glomo.transfer.signal.multitask import SharedBottom, SharedMiddle, weighted_loss
from glomo.transfer.signal.negative_transfer import TransferEffect, transfer_effect
from glomo.transfer.signal.perturbations import add_noise, drop_units, embedding_noise, mask_units
from glomo.transfer.signal.recording import batches_fingerprint, record, recorded
from glomo.transfer.signal.sampling import RoundRobin, TaskSampler, annealed_alpha, task_batches
from glomo.transfer.signal.signal_annealing import tsa_loss, tsa_threshold
from glomo.transfer.signal.slices import SliceHeads, slice_members

__all__ = [
    "Ensemble",
    "ExponentialAverage",
    "RoundRobin",
    "SharedBottom",
    "SharedMiddle",
    "SliceHeads",
    "TaskSampler",
    "TransferEffect",
    "add_noise",
    "annealed_alpha",
    "batches_fingerprint",
    "consistency_loss",
    "consistency_ramp",
    "distillation_loss",
    "drop_units",
    "embedding_noise",
    "mask_units",
    "record",
    "recorded",
    "slice_members",
    "task_batches",
    "transfer_effect",
    "tsa_loss",
    "tsa_threshold",
    "uniform_soup",
    "weighted_loss",
]
