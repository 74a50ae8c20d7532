"""Multi-head attention on glomo's kernels, in the place of `torch.nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glomo.kernels import (
    attention,
    attention_varlen,
    relu2_affinity,
    relu2_attention,
    relu2_attention_varlen,
)
from glomo.nn.linear import linear

ACTIVATIONS = ("softmax", "relu2")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    affinity_bias: Tensor | float | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`glomo.attention`, or, with an affinity_bias for its scores, :func:`glomo.relu2_attention` with the same
    default scale. A bool mask says what may be read, a floating one is added to the scores."""
    if affinity_bias is None:
        return cast(Tensor, attention(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa))
    if mask is not None and mask.dtype != torch.bool:
        affinity_bias, mask = affinity_bias + mask, None
    scale = query.size(-1) ** -0.5 if scale is None else scale
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "enable_gqa": enable_gqa}
    return cast(Tensor, relu2_attention(query, key, value, affinity_bias, mask, scale=scale, **options))


def _hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Sees a call and changes nothing."""


def _nested_like(query: Tensor, sequences: list[Tensor]) -> Tensor:
    """The sequences as a nested tensor with the lengths of the query, which can be added to it."""
    if not sequences:
        return query
    jagged = cast(Any, query)
    if query.layout == torch.jagged and jagged.lengths() is None:
        return torch.nested.nested_tensor_from_jagged(torch.cat(sequences), jagged.offsets())
    return torch.nested.as_nested_tensor(sequences, layout=query.layout)


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`, argument for argument and weight for weight, computed by :func:`glomo.attention`
    or, with ``activation="relu2"``, by :func:`glomo.relu2_attention`.

    .. code-block:: text

        head_h = activation(scale * (x_q Wq_h) (x_k Wk_h)^T + mask) (x_v Wv_h)
        out    = [head_1, ..., head_H] Wo + bo,    scale = 1 / sqrt(embed_dim / num_heads)

    ``relu2`` has one more parameter, ``affinity_bias`` (num_heads, 1, 1), which starts at 1 and is added to the scores.
    In place of a layer's ``self_attn`` it is called in evaluation as well, where PyTorch's own layers would go past it.

    It differs in this: a target that may read nothing gives zeros, never NaN; with ``is_causal`` and a
    key_padding_mask both are used and no matrix of pairs is made.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            PyTorch.
        activation: "softmax", or "relu2" for ReLU²-normalised weights.

    Raises:
        ValueError: embed_dim is no multiple of num_heads, dropout no probability, or the activation unknown.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "softmax",
    ) -> None:
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a positive multiple of num_heads, not {embed_dim} for {num_heads} heads."
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be a probability, not {dropout}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.activation = activation
        bias_of_heads = torch.ones(num_heads, 1, 1, device=device, dtype=dtype)
        self.affinity_bias = nn.Parameter(bias_of_heads) if activation == "relu2" else None
        # In evaluation PyTorch's layers go past their modules to a fused layer of their own, unless one has a hook.
        self.register_forward_pre_hook(_hook)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """PyTorch's meanings: in a bool mask True hides a source, a floating one is added to the scores.

        Args:
            query: (T, B, embed_dim), (B, T, embed_dim) with batch_first, or (T, embed_dim); or a nested tensor (B,
                ragged, embed_dim), which is key and value as well.
            key: (S, B, kdim) in the same layout.
            value: (S, B, vdim).
            key_padding_mask: (B, S), or (S,) without a batch.
            need_weights: also return the weights, which takes a (T, S) matrix for every head.
            attn_mask: (T, S) or (B * num_heads, T, S).
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: says that attn_mask is the causal mask; then the mask is not read.

        Returns:
            (out in the query's layout, weights): None, or (B, T, S), or (B, num_heads, T, S) without averaging;
            without the batch where there is none.
        """
        if query.is_nested:
            alone = query is key and key is value and key_padding_mask is None and attn_mask is None
            if not alone or is_causal or self.in_proj_weight is None or self.bias_k is not None or self.add_zero_attn:
                raise ValueError(
                    "A nested query must be key and value as well, without masks, is_causal, add_bias_kv and "
                    "add_zero_attn."
                )
            return self._nested_with_weights(query, average_attn_weights) if need_weights else self._nested(query)
        batched = query.dim() == 3
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        packed = self._project(query, key, value)
        heads = (x.view(*x.shape[:-1], self.num_heads, self.head_dim) for x in packed)
        if not batched:
            q, k, v = (x.transpose(0, 1)[None] for x in heads)
        elif self.batch_first:
            q, k, v = (x.transpose(1, 2) for x in heads)
        else:
            q, k, v = (x.permute(1, 2, 0, 3) for x in heads)
        extra = (self.bias_k is not None) + self.add_zero_attn
        causal = is_causal and not need_weights and not extra
        mask = self._mask(q, k, key_padding_mask, None if causal else attn_mask, extra)
        k, v = self._lengthen(k, self.bias_k), self._lengthen(v, self.bias_v)

        weights = None
        dropout_p = self.dropout if self.training else 0.0
        if need_weights:
            weights = F.dropout(self._weights(q, k, mask), dropout_p)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            out = attend(q, k, v, mask, dropout_p, causal, self.affinity_bias)
        if not batched:
            out = out[0].transpose(0, 1)
        else:
            out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        # as in PyTorch the weights of out_proj, not the module: its hooks are not called
        return linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias), weights

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Raises ValueError or TypeError with the shapes."""
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.size(-1) != width:
                raise ValueError(
                    f"{name} must be (length, batch, {width}), batch and length swapped with batch_first, or "
                    f"(length, {width}), all three alike; it is {tuple(x.shape)} beside a query {tuple(query.shape)}."
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must have one length and batch.")
        batched = query.dim() == 3
        time, batch = (-2, 0) if self.batch_first or not batched else (0, 1)
        if batched and query.size(batch) != key.size(batch):
            raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must have one batch size.")
        T, S, B = query.size(time), key.size(time), query.size(batch) if batched else 1
        for name, mask, shapes in (
            ("key_padding_mask", key_padding_mask, [(B, S) if batched else (S,)]),
            ("attn_mask", attn_mask, [(T, S), (B * self.num_heads, T, S)]),
        ):
            if mask is None:
                continue
            if mask.dtype not in (torch.bool, query.dtype, torch.float32):
                raise TypeError(
                    f"{name} is {mask.dtype}; it must be bool (True hides a source), or of the query's dtype "
                    f"{query.dtype} or fp32."
                )
            if tuple(mask.shape) not in shapes:
                wanted = " or ".join(str(shape) for shape in shapes)
                raise ValueError(f"{name} is {tuple(mask.shape)}, but must be {wanted}.")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is the causal mask, so that attn_mask must be given too.")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """query, key and value times their weights, in as few products as they allow."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            inputs = (query, key, value)
            return tuple(linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        if query is key and key is value:
            return linear(query, weight, bias).chunk(3, -1)
        sizes = [self.embed_dim, 2 * self.embed_dim] if key is value else [self.embed_dim] * 3
        biases = (None,) * 3 if bias is None else bias.split(sizes)
        inputs = (query, key) if key is value else (query, key, value)
        found = [linear(x, w, b) for x, w, b in zip(inputs, weight.split(sizes), biases, strict=False)]
        return (found[0], *found[1].chunk(2, -1)) if key is value else tuple(found)

    def _mask(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, extra: int
    ) -> Tensor | None:
        """Both masks as one that broadcasts to (B, num_heads, T, S + extra): bool with True for what may be read, or
        floating if one of them is."""
        masks = []
        if key_padding_mask is not None:
            masks.append(key_padding_mask[..., None, None, :] if key_padding_mask.dim() == 2 else key_padding_mask)
        if attn_mask is not None:
            heads = (1, 1) if attn_mask.dim() == 2 else (query.size(0), self.num_heads)
            masks.append(attn_mask.view(*heads, query.size(-2), key.size(-2)))
        if not masks:
            return None
        if all(mask.dtype == torch.bool for mask in masks):
            mask = ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
            return F.pad(mask, (0, extra), value=True) if extra else mask
        added = [
            torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))
            if mask.dtype == torch.bool
            else mask
            for mask in masks
        ]
        return F.pad(sum(added[1:], added[0]), (0, extra)) if extra else sum(added[1:], added[0])

    def _lengthen(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """(B, num_heads, S, head_dim) with add_bias_kv's learned source and add_zero_attn's zeros behind."""
        parts = [x]
        if learned is not None:
            parts.append(learned.view(self.num_heads, 1, -1).to(x.dtype).expand(x.size(0), -1, -1, -1))
        if self.add_zero_attn:
            parts.append(x.new_zeros(*x.shape[:2], 1, x.size(-1)))
        return torch.cat(parts, -2) if len(parts) > 1 else x

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """(B, num_heads, T, S), zeros in the row of a target that may read nothing."""
        scale = query.size(-1) ** -0.5
        if self.affinity_bias is not None:
            if mask is None or mask.dtype == torch.bool:
                return relu2_affinity(query, key, self.affinity_bias, mask, scale=scale)
            return relu2_affinity(query, key, self.affinity_bias + mask, scale=scale)
        scores = (query * scale) @ key.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        if mask is None:
            return scores.softmax(-1)
        dead = (scores == float("-inf")).all(-1, keepdim=True)
        return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)

    def _nested(self, query: Tensor) -> tuple[Tensor, None]:
        """Self-attention of a nested tensor (B, ragged, embed_dim), which PyTorch's encoder makes of a padded batch."""
        sequences = query.unbind()
        if not sequences:
            return query, None
        lengths = [len(x) for x in sequences]
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)
        packed = linear(torch.cat(sequences), self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.view(-1, 3, self.num_heads, self.head_dim).unbind(-3)
        where = (ends, ends, max(lengths), max(lengths))
        dropout_p = self.dropout if self.training else 0.0
        if self.affinity_bias is None:
            heads = attention_varlen(q, k, v, *where, dropout_p=dropout_p)
        else:
            bias, scale = self.affinity_bias.flatten(), q.size(-1) ** -0.5
            heads = relu2_attention_varlen(q, k, v, *where, bias, dropout_p=dropout_p, scale=scale)
        out = linear(cast(Tensor, heads).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return _nested_like(query, list(out.split(lengths))), None

    def _nested_with_weights(self, query: Tensor, average: bool) -> tuple[Tensor, Tensor]:
        """The same by way of a padded batch; weights (B, S, S) or (B, num_heads, S, S) are 0 behind a sequence."""
        lengths = [len(x) for x in query.unbind()]
        if any(lengths):
            x = query.to_padded_tensor(0.0)
        else:
            x = torch.zeros(len(lengths), 0, self.embed_dim, dtype=query.dtype, device=query.device)
        behind = torch.arange(x.size(1), device=x.device) >= torch.tensor(lengths, device=x.device).view(-1, 1)
        x = x if self.batch_first else x.transpose(0, 1)
        out, weights = self.forward(x, x, x, behind, average_attn_weights=average)
        out = out if self.batch_first else out.transpose(0, 1)
        sequences = [y[:length] for y, length in zip(out, lengths, strict=True)]
        hidden = behind[:, :, None] if average else behind[:, None, :, None]
        return _nested_like(query, sequences), cast(Tensor, weights).masked_fill(hidden, 0.0)
