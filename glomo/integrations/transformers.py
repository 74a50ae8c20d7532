"""glomo's attention for Hugging Face models (transformers 5): `register()`, then
``from_pretrained(..., attn_implementation="glomo")`` or ``model.set_attn_implementation("glomo")``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glomo.nn.attention import attend

NAMES = ("glomo", "glomo_relu2")
NEEDED = 'glomo.integrations.transformers needs transformers 5 (pip install "transformers>=5")'


def register() -> None:
    """Makes "glomo" (softmax) and "glomo_relu2" (ReLU²-normalised weights) known to transformers as attention
    implementations.

    Masks of padding, with or without the diagonal, stay (B, 1, 1, S), and no matrix of pairs is made; all others are
    the boolean masks that transformers makes for PyTorch's SDPA. With "glomo_relu2" a module's own `affinity_bias`, if
    it has one, is added to the scores, else 1.

    Raises:
        ImportError: transformers is not installed, or older than version 5.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"{NEEDED}, and none is installed") from error
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(f"{NEEDED}, and this is {transformers.__version__}")
    for name in NAMES:
        transformers.AttentionInterface.register(name, _forward(relu2=name == "glomo_relu2"))
        transformers.AttentionMaskInterface.register(name, padding_or_full_mask)


def padding_or_full_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers' sdpa_mask returns, but (B, 1, 1, S) where only padding is masked: the attention adds the
    diagonal of a causal module itself."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    square = q_length == kv_length and not q_offset and not kv_offset
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.size(-1) == kv_length:
        causal = mask_function is causal_mask_function and square and q_length > 1
        if (mask_function is bidirectional_mask_function and not kv_offset) or causal:
            return attention_mask[:, None, None, :].bool()
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def _forward(relu2: bool) -> Callable:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query (B, H, T, E), key and value (B, Hk, S, E) -> (B, T, H, E)."""
        for name in ("softcap", "s_aux", "cache"):
            if kwargs.get(name) is not None:
                raise ValueError(f"glomo's attention has no {name}, which {type(module).__name__} asks for.")
        T, S = query.size(-2), key.size(-2)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        padding = attention_mask is None or (attention_mask.size(-2) == 1 and T == S)
        causal = bool(causal and T > 1 and padding)
        if causal and S > T:  # an empty static cache: its end is not filled yet
            key, value = key[..., :T, :], value[..., :T, :]
            position_bias = None if position_bias is None else position_bias[..., :T]
        if position_bias is not None:
            attention_mask = _with_positions(position_bias, attention_mask)
        bias = getattr(module, "affinity_bias", 1.0) if relu2 else None
        gqa = key.size(1) != query.size(1)
        out = attend(query, key, value, attention_mask, dropout, causal, bias, scaling, gqa)
        return out.transpose(1, 2).contiguous(), None

    return forward


def _with_positions(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """A position bias (1, H, T, S) and a mask as one floating mask."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask
