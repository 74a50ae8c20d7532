"""GLoMo as modules: pre-training (`GLoMo`), the frozen graph (`FrozenGraph`), transfer (`GraphTransfer`), controls;
multi-head attention in the place of PyTorch's (`MultiheadAttention`), the Transformer on it (`Transformer`,
`LanguageModel`)."""

from glomo.nn.attention import MultiheadAttention
from glomo.nn.baselines import BandGraph, GraphSource, MatchGraph, NoGraph, UniformGraph
from glomo.nn.config import GLoMoConfig
from glomo.nn.decoder import ContextDecoder
from glomo.nn.feature_predictor import FeaturePredictor
from glomo.nn.frozen import FrozenGraph, TunedGraph, random_graph
from glomo.nn.glomo import GLoMo
from glomo.nn.graph_predictor import GraphPredictor
from glomo.nn.graphs import Graphs, GraphStatistics, dead_row_rescue, graph_l1, reverse
from glomo.nn.transfer import GatedFusion, GraphTransfer
from glomo.nn.transformer import LanguageModel, Transformer
from glomo.nn.transformer_config import TransformerConfig

__all__ = [
    "BandGraph",
    "ContextDecoder",
    "FeaturePredictor",
    "FrozenGraph",
    "GLoMo",
    "GLoMoConfig",
    "GatedFusion",
    "GraphPredictor",
    "GraphSource",
    "GraphStatistics",
    "GraphTransfer",
    "Graphs",
    "LanguageModel",
    "MatchGraph",
    "MultiheadAttention",
    "NoGraph",
    "Transformer",
    "TransformerConfig",
    "TunedGraph",
    "UniformGraph",
    "dead_row_rescue",
    "graph_l1",
    "random_graph",
    "reverse",
]
