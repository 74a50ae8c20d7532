"""Looking inside a trained model: what its features hold, what its units and heads do, how it behaves."""

from glomo.transfer.probing.agreement import MinimalPair, agreement_pairs
from glomo.transfer.probing.analogies import (
    AnalogyScore,
    SimilarityScore,
    analogies,
    read_analogies,
    read_similarities,
    similarity,
)
from glomo.transfer.probing.behaviour import PairScore, log_probability, minimal_pairs, next_unit
from glomo.transfer.probing.control import (
    Selectivity,
    control_labels,
    probe_layers,
    probe_table,
    selectivity,
    word_majority,
)
from glomo.transfer.probing.correlation import pearson, ranks, spearman
from glomo.transfer.probing.erasure import Importance, erase_features, erase_words, erased
from glomo.transfer.probing.features import layer_features
from glomo.transfer.probing.maps import HeadStatistics, attention_maps, draw_maps, head_statistics
from glomo.transfer.probing.neurons import mutual_information, top_examples, top_units, unit_correlations
from glomo.transfer.probing.probe_model import LINEAR, MLP, Probe, ProbeSettings
from glomo.transfer.probing.probes import ProbeResult, RegressionResult, probe, regression_probe
from glomo.transfer.probing.splits import Split, split_documents
from glomo.transfer.probing.surface import (
    PUBLISHED_BINS,
    PositionTask,
    SurfaceTask,
    content_task,
    length_task,
    position_task,
    shift_task,
)

__all__ = [
    "LINEAR",
    "MLP",
    "PUBLISHED_BINS",
    "AnalogyScore",
    "HeadStatistics",
    "Importance",
    "MinimalPair",
    "PairScore",
    "PositionTask",
    "Probe",
    "ProbeResult",
    "ProbeSettings",
    "RegressionResult",
    "Selectivity",
    "SimilarityScore",
    "Split",
    "SurfaceTask",
    "agreement_pairs",
    "analogies",
    "attention_maps",
    "content_task",
    "control_labels",
    "draw_maps",
    "erase_features",
    "erase_words",
    "erased",
    "head_statistics",
    "layer_features",
    "length_task",
    "log_probability",
    "minimal_pairs",
    "mutual_information",
    "next_unit",
    "pearson",
    "position_task",
    "probe",
    "probe_layers",
    "probe_table",
    "ranks",
    "read_analogies",
    "read_similarities",
    "regression_probe",
    "selectivity",
    "shift_task",
    "similarity",
    "spearman",
    "split_documents",
    "top_examples",
    "top_units",
    "unit_correlations",
    "word_majority",
]
