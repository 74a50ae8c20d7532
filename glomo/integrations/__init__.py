"""glomo's attention in other people's code: whatever calls PyTorch's (`sdpa`), and Hugging Face's models
(`transformers`)."""

from glomo.integrations.sdpa import patch_sdpa

__all__ = ["patch_sdpa"]
