"""glomo: ReLU²-normalised relational graphs, attention and exact transfer training for PyTorch.

The ops are plain functions on tensors: `glomo.relu2_attention(query, key, value, bias=1.0)`. Modules are in `glomo.nn`.
"""

from . import kernels as kernels
from .integrations import patch_sdpa
from .kernels import (
    EPS,
    attention,
    attention_varlen,
    graph_mix,
    relu2_affinity,
    relu2_attention,
    relu2_attention_varlen,
    relu2_graph_mix,
)
from .pretrained import load_pretrained

__version__ = "0.1.0"

__all__ = [
    "EPS",
    "attention",
    "attention_varlen",
    "graph_mix",
    "load_pretrained",
    "patch_sdpa",
    "relu2_affinity",
    "relu2_attention",
    "relu2_attention_varlen",
    "relu2_graph_mix",
]
