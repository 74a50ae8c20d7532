"""Fused ops, each with a plain-PyTorch reference that defines it. Every op is also importable as `glomo.<name>`."""

from .arguments import EPS
from .attention import attention, attention_varlen
from .backend import BACKENDS, explain, use_backend
from .graph_mix import graph_mix
from .relu2_affinity import relu2_affinity
from .relu2_attention import relu2_attention, relu2_attention_varlen
from .relu2_graph_mix import relu2_graph_mix

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
