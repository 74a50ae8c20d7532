"""Fused ops, each with a plain-PyTorch reference that defines it. Every op is also importable as `glomo.<name>`.

In the project's root this folder can also be imported as `kernels`, and transformers does so, in search of Hugging
Face's package of that name: absolute imports make that another name for the same ops, not a second registration.
"""

from glomo.kernels.arguments import EPS
from glomo.kernels.attention import attention, attention_varlen
from glomo.kernels.backend import BACKENDS, explain, use_backend
from glomo.kernels.graph_mix import graph_mix
from glomo.kernels.relu2_affinity import relu2_affinity
from glomo.kernels.relu2_attention import relu2_attention, relu2_attention_varlen
from glomo.kernels.relu2_graph_mix import relu2_graph_mix

__all__ = [
    "BACKENDS",
    "EPS",
    "attention",
    "attention_varlen",
    "explain",
    "graph_mix",
    "relu2_affinity",
    "relu2_attention",
    "relu2_attention_varlen",
    "relu2_graph_mix",
    "use_backend",
]
