"""What is added to, or taken from, a pre-trained network: adapters, LoRA, projected attention, layers."""

from glomo.transfer.structure.adapter import Adapter, ParallelAdapter, SerialAdapter
from glomo.transfer.structure.bottleneck import BottleneckAdapter, ParallelBottleneck, bottleneck, parallel_bottleneck
from glomo.transfer.structure.files import about_adapters, load_adapters, save_adapters
from glomo.transfer.structure.insertion import adapter_patterns, add, remove
from glomo.transfer.structure.layers import (
    Transferred,
    chosen_layers,
    copy_layers,
    initialise_from_language_model,
)
from glomo.transfer.structure.lora import ConvLoRA, EmbeddingLoRA, LinearLoRA, LoRA
from glomo.transfer.structure.lora_weights import WeightLoRA, lora
from glomo.transfer.structure.merging import merge, unmerge
from glomo.transfer.structure.projected_attention import (
    LowRank,
    ProjectedAttention,
    low_rank,
    projected_attention,
)
from glomo.transfer.structure.residual import ParallelResidual, SerialResidual, parallel_residual, serial_residual

__all__ = [
    "Adapter",
    "BottleneckAdapter",
    "ConvLoRA",
    "EmbeddingLoRA",
    "LinearLoRA",
    "LoRA",
    "LowRank",
    "ParallelAdapter",
    "ParallelBottleneck",
    "ParallelResidual",
    "ProjectedAttention",
    "SerialAdapter",
    "SerialResidual",
    "Transferred",
    "WeightLoRA",
    "about_adapters",
    "adapter_patterns",
    "add",
    "bottleneck",
    "chosen_layers",
    "copy_layers",
    "initialise_from_language_model",
    "load_adapters",
    "lora",
    "low_rank",
    "merge",
    "parallel_bottleneck",
    "parallel_residual",
    "projected_attention",
    "remove",
    "save_adapters",
    "serial_residual",
    "unmerge",
]
