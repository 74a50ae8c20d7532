"""Projected attention against its formula, beside layers of several makes."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from glomo.nn import LanguageModel, MultiheadAttention, Transformer, TransformerConfig
from glomo.transfer.structure import LowRank, ProjectedAttention, add, low_rank, projected_attention, remove
from glomo.transfer.structure.insertion import adapters


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def linear(layer, x):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def formula(adapter, h, allowed):
    """TS(h) of (T, width) in loops; allowed (T, T)."""
    size, heads = adapter.settings["size"], adapter.heads
    packed = linear(adapter.packed, linear(adapter.encoder, h))
    query, key, value = packed[:, :size], packed[:, size : 2 * size], packed[:, 2 * size :]
    read = np.zeros((len(h), size))
    for head in range(heads):
        part = slice(head * size // heads, (head + 1) * size // heads)
        for t in range(len(h)):
            scores = {
                s: math.exp(query[t, part] @ key[s, part] / math.sqrt(size // heads))
                for s in range(len(h))
                if allowed[t, s]
            }
            for s, score in scores.items():
                read[t, part] += score / sum(scores.values()) * value[s, part]
    return gelu(linear(adapter.decoder, read))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_formula(causal, batch_first, stir):
    adapter = ProjectedAttention(5, 6, 3, dropout=0.0, causal=causal, batch_first=batch_first).double()
    stir(adapter)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    h = torch.randn(2, 4, 5, dtype=torch.float64)
    lengths = [4, 3]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    found = adapter(h if batch_first else h.transpose(0, 1), mask[:, None, None, :])
    found = found if batch_first else found.transpose(0, 1)
    for row in range(2):
        allowed = mask[row].numpy()[None, :] & (np.tri(4, dtype=bool) if causal else np.ones((4, 4), bool))
        expected = formula(adapter, h[row].numpy(), allowed)
        np.testing.assert_allclose(found[row].detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_the_low_rank_formula():
    adapter = LowRank(5, 3).double()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    h = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = linear(adapter.decoder, gelu(linear(adapter.encoder, h.numpy())))
    np.testing.assert_allclose(adapter(h).detach().numpy(), expected, rtol=1e-12)


def test_published_defaults():
    adapter = projected_attention(width=768)(nn.Identity(), "layer")
    assert {name: adapter.settings[name] for name in ("width", "size", "heads", "causal")} == {
        "width": 768, "size": 204, "heads": 12, "causal": False,
    }  # fmt: skip
    assert low_rank(width=768)(nn.Identity(), "layer").settings["size"] == 100
    for layer in (adapter.encoder, adapter.packed, adapter.decoder):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert not layer.bias.any()


def layers(count=3):
    config = TransformerConfig.preset("tiny", vocab_size=9, layers=count, dim=12, heads=2, ff=8, dropout=0.0)
    return LanguageModel(config).double()


def test_projections_are_shared_and_attention_is_not(stir):
    model = layers()
    add(model, r"decoder\.layers\.\d", projected_attention(6, 3, width=12))
    first, second, third = (one.adapter for one in adapters(model))
    for name in ("encoder", "decoder"):
        assert getattr(first, name) is getattr(second, name) is getattr(third, name)
    assert len({id(one.packed.weight) for one in (first, second, third)}) == 3
    add(model, r"decoder\.layers\.\d", projected_attention(6, 3, width=12), "other")  # another task
    assert model.decoder.layers[0].other.encoder is not first.encoder
    count = sum(p.numel() for n, p in model.named_parameters() if ".adapter." in n)
    assert count == (12 * 6 + 6) + (6 * 12 + 12) + 3 * (6 * 18 + 18)
    twin = copy.deepcopy(model)
    assert twin.decoder.layers[0].adapter.encoder is twin.decoder.layers[2].adapter.encoder
    assert twin.decoder.layers[0].adapter.encoder is not first.encoder
    own = [one.adapter for one in adapters(layers_with_low_rank())]
    assert own[0].encoder is not own[1].encoder


def layers_with_low_rank():
    model = layers()
    add(model, r"decoder\.layers\.\d", low_rank(4, width=12))
    return model


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_into_the_sum_of_a_pytorch_layer(norm_first, training, stir):
    """Before the layer's last LayerNorm: h' = LN(a + FFN(a) + TS(h)); in a layer that normalises first, its output."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first).double().train(training)
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    lengths = torch.tensor([5, 3])
    padding = torch.arange(5) >= lengths[:, None]
    plain = copy.deepcopy(layer)
    add(layer, "", projected_attention(6, 3, 0.0, into="dropout2", width=8))
    stir(layer)
    found = layer(h, src_key_padding_mask=padding)
    ts = torch.stack([
        torch.from_numpy(formula(layer.adapter, h[row].numpy(), np.ones((5, 1), bool) & ~padding[row].numpy()))
        for row in range(2)
    ])  # fmt: skip
    captured = []
    plain.dropout2.register_forward_hook(lambda module, args, output: captured.append(output) or output + ts)
    expected = plain(h, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])
    assert captured
    if norm_first:
        remove(layer)
        base = layer(h, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], (base + ts)[~padding])


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, MultiheadAttention])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_of_attentions(kind, batch_first, stir):
    attention = kind(8, 2, batch_first=batch_first).double()
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    x = h if batch_first else h.transpose(0, 1)
    as_float = lambda mask: torch.zeros(mask.shape, dtype=x.dtype).masked_fill(mask, float("-inf"))
    base = attention(x, x, x, padding, attn_mask=hidden)[0]
    add(attention, "", projected_attention(6, 3, 0.0))
    assert attention.adapter.batch_first == batch_first
    stir(attention)
    expected = torch.stack([
        torch.from_numpy(formula(attention.adapter, h[row].numpy(), ~hidden.numpy() & ~padding[row].numpy()))
        for row in range(2)
    ])  # fmt: skip
    expected = expected if batch_first else expected.transpose(0, 1)
    for pad, pairs in ((padding, hidden), (as_float(padding), as_float(hidden))):
        torch.testing.assert_close(attention(x, x, x, pad, attn_mask=pairs)[0] - base, expected)
    adapter = attention.adapter
    mixed = adapter.beside(attention, {"query": x, "key_padding_mask": padding, "attn_mask": as_float(hidden)})
    torch.testing.assert_close(mixed, expected)
    with pytest.raises(ValueError, match=r"attn_mask is \(4, 5, 5\), another mask for each head"):
        attention(x, x, x, attn_mask=hidden.expand(4, 5, 5))


def test_a_language_model_stays_causal(stir):
    model = layers().eval()
    add(model, r"decoder\.layers\.\d", projected_attention(6, 3, width=12))
    add(model, r"decoder\.layers\.1", projected_attention(6, 3, into="outer"), "within")
    stir(model)
    units = torch.randint(1, 9, (2, 6))
    other = units.clone()
    other[:, 4:] = 1
    torch.testing.assert_close(model.hidden(units)[:, :4], model.hidden(other)[:, :4])
    assert not torch.allclose(model.hidden(units)[:, 5], model.hidden(other)[:, 5])
    with pytest.raises(ValueError, match="it cannot go on from a cache"):
        model.start().step(torch.tensor([9, 9]))


def test_batch_mates_and_padding_do_not_matter(stir):
    config = TransformerConfig.preset("tiny", vocab_size=9, dim=12, heads=2, ff=8)
    model = Transformer(config).double().eval()
    add(model, r"(?:encoder|decoder)\.layers\.\d", projected_attention(6, 3, width=12))
    stir(model)
    source, lengths = torch.randint(1, 9, (2, 6)), torch.tensor([6, 4])
    source[1, 4:] = 0
    both = model.encode(source, lengths).memory
    alone = model.encode(source[1:, :4], lengths[1:]).memory
    torch.testing.assert_close(both[1:, :4], alone)
    add(model, r"decoder\.layers\.0\.over_memory", projected_attention(6, 3, width=12))
    with pytest.raises(ValueError, match="it cannot stand beside one over a memory"):
        model(source, lengths, source, lengths)


def test_no_graph_is_kept_of_a_call_that_fails(stir):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    add(layer, "", projected_attention(6, 3, into="linear2"))
    layer.linear1 = nn.Linear(3, 16)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5, 8))
    assert layer.adapter._summand is None
    copy.deepcopy(layer)


def test_the_generator():
    state = torch.get_rng_state()
    a, b = (ProjectedAttention(6, 4, 2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_mistakes():
    with pytest.raises(ValueError, match="size is 7; it must be a multiple of heads, which is 2"):
        ProjectedAttention(4, 7, 2)
    with pytest.raises(ValueError, match="heads is 0"):
        ProjectedAttention(4, 7, 0)
    with pytest.raises(ValueError, match=r"dropout is 1.5; a probability"):
        ProjectedAttention(4, 6, 2, dropout=1.5)
    with pytest.raises(ValueError, match="width is 0"):
        LowRank(0)
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(6, 6)})
    with pytest.raises(ValueError, match=r"'b' is 6 wide, and the first of the layers, .* 4"):
        add(net, "a|b", projected_attention(6, 2))
    with pytest.raises(ValueError, match="into is 'x', and 'a', a Linear, has no module called so"):
        add(net, "a", projected_attention(6, 2, into="x"))
