"""Attention collected from modules against weights computed by hand; figures of heads in loops."""

import math

import pytest
import torch
from torch import nn

import glomo.nn
from glomo.transfer.probing import attention_maps, draw_maps, head_statistics


def by_hand(attention, x, allowed=None):
    """softmax(q k^T / sqrt(d)) of each head of self-attention, from the module's weights."""
    q, k, _ = (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
    heads = attention.num_heads
    q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k))
    scores = q @ k.mT / math.sqrt(q.size(-1))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1)


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, glomo.nn.MultiheadAttention])
@pytest.mark.parametrize("batch_first", [True, False])
def test_weights_of_one_attention(kind, batch_first):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = kind(8, 2, batch_first=batch_first, dropout=0.5)

        def forward(self, x, **options):
            x = x if batch_first else x.transpose(0, 1)
            return self.attention(x, x, x, **options)

    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]
    found = attention_maps(model, x, key_padding_mask=padding)
    expected = by_hand(model.attention, x, ~padding[:, None, None])
    torch.testing.assert_close(found["attention"], expected.detach())
    assert model.training
    # callers get what they have asked for
    seen = []
    model.attention.register_forward_hook(lambda m, i, o: seen.append(o[1]))
    model.eval()
    for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        plain = model(x, **options)
        found = {}
        inside = model.forward
        model.forward = lambda *a, inside=inside, found=found, **k: found.setdefault("out", inside(*a, **k))
        attention_maps(model, x, **options)
        model.forward = inside
        torch.testing.assert_close(found["out"][0], plain[0])
        if plain[1] is None:
            assert found["out"][1] is None
        else:
            torch.testing.assert_close(found["out"][1], plain[1])


@pytest.mark.parametrize("ours", [False, True])
def test_pytorchs_encoder(ours):
    """Its layers ask for no weights, go past the attention in evaluation, and nest a padded batch."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    if ours:
        for one in model.layers:
            old, one.self_attn = one.self_attn, glomo.nn.MultiheadAttention(8, 2, batch_first=True)
            one.self_attn.load_state_dict(old.state_dict())
    x = torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 4, [False, False, False, True]])
    model.eval()
    before = model(x, src_key_padding_mask=padding)
    found = attention_maps(model, x, src_key_padding_mask=padding)
    assert list(found) == ["layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(
        found["layers.0.self_attn"], by_hand(model.layers[0].self_attn, x, ~padding[:, None, None]).detach()
    )
    torch.testing.assert_close(model(x, src_key_padding_mask=padding), before)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    found = attention_maps(model, x, mask=causal, is_causal=True)
    assert (found["layers.1.self_attn"].triu(1) == 0).all()
    assert not any(m._forward_hooks for m in model.modules())


def test_one_that_runs_twice_and_no_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            x, _ = self.attention(x, x, x)
            return self.attention(x, x, x, None, False)  # positional arguments too

    found = attention_maps(Model(), torch.randn(3, 4))
    assert list(found) == ["attention", "attention (2)"]
    assert found["attention (2)"].shape == (1, 2, 3, 3)


def test_hugging_face():
    transformers = pytest.importorskip("transformers", reason="the test reads a Hugging Face model's attentions")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2Model._from_config(config, attn_implementation="eager").eval()
    attentions = model(torch.tensor([[1, 2, 3, 4]]), output_attentions=True).attentions
    for layer in attentions:
        statistics = head_statistics(layer)
        assert statistics.entropy.shape == (2,)
        assert (statistics.distance >= 0).all()


def test_statistics_in_loops():
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(3, 2, 5, 5, generator=generator)
    weights[0, 0, 1] = 0  # reads nothing: does not count
    weights[:, :, :, 3] *= 2
    lengths = [5, 3, 1]
    found = head_statistics(weights, torch.tensor(lengths))
    for head in range(2):
        sums, count, previous, with_previous = [0.0] * 4, 0, 0.0, 0
        for b, n in enumerate(lengths):
            for i in range(n):
                row = [float(weights[b, head, i, j]) for j in range(n)]
                if sum(row) == 0:
                    continue
                a = [w / sum(row) for w in row]
                count += 1
                sums[0] += sum(p * abs(i - j) for j, p in enumerate(a))
                sums[1] -= sum(p * math.log(p) for p in a if p)
                sums[2] += a[i]
                sums[3] += a[0]
                if i:
                    previous, with_previous = previous + a[i - 1], with_previous + 1
        expected = [s / count for s in sums]
        assert [float(found[k][head]) for k in (0, 1, 2, 4)] == pytest.approx(expected)
        assert float(found.previous[head]) == pytest.approx(previous / with_previous)


def test_known_heads():
    eye = torch.eye(6)
    shifted = torch.zeros(6, 6)
    shifted[range(1, 6), range(5)] = 1
    first, even = torch.zeros(6, 6), torch.full((6, 6), 1 / 6)
    first[:, 0] = 1
    found = head_statistics(torch.stack([eye, shifted, first, even])[None])
    assert found.diagonal.tolist() == pytest.approx([1, 0, 1 / 6, 1 / 6])
    assert found.previous.tolist() == pytest.approx([0, 1, 1 / 5, 1 / 6])
    assert found.first.tolist() == pytest.approx([1 / 6, 1 / 5, 1, 1 / 6])
    assert found.distance.tolist() == pytest.approx([0, 1, 2.5, 35 / 18])
    assert found.entropy.tolist() == pytest.approx([0, 0, 0, math.log(6)], abs=1e-9)
    assert torch.isnan(head_statistics(torch.zeros(1, 1, 2, 2)).entropy).all()
    one = head_statistics(torch.ones(1, 1, 1, 1))
    assert float(one.diagonal) == 1
    assert torch.isnan(one.previous).all()


def test_batch_mates_and_padding_do_not_matter():
    weights = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    alone = head_statistics(weights[1:, :, :2, :2])
    padded = head_statistics(weights[1:], torch.tensor([2]))
    for a, b in zip(alone, padded, strict=True):
        torch.testing.assert_close(a, b)
    assert head_statistics(weights.bfloat16()).entropy.dtype == torch.float64


def test_pictures_show_every_weight_once(monkeypatch, tmp_path):
    seen = {}

    def heat_maps(graphs, num_heads, words, path):
        seen.update(graphs=graphs, heads=num_heads, words=words, path=path)

    monkeypatch.setattr("glomo.plots.heat_maps", heat_maps)
    layers = {name: torch.rand(2, 3, 5, 5).bfloat16() for name in ("a", "b")}
    draw_maps(layers, ["the", "cat", "sat"], tmp_path / "maps.png", example=1)
    assert seen["heads"] == 3
    expected = torch.cat([layer[1, :, :3, :3] for layer in layers.values()]).float()
    assert torch.equal(seen["graphs"], expected[None])


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    draw_maps([torch.rand(1, 2, 3, 3)], ["a", "b", "c"], tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="it has none"):
        attention_maps(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"the weights are \(1, 2, 3, 4\); \(B, heads, T, T\)"):
        head_statistics(torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="none below 0"):
        head_statistics(-torch.ones(1, 2, 3, 3))
    with pytest.raises(ValueError, match=r"the lengths are \[4\]; 1 numbers from 1 to 3"):
        head_statistics(torch.ones(1, 2, 3, 3), torch.tensor([4]))
    for weights, words in (
        ([], "the weights are none"),
        ([torch.ones(1, 2, 3, 3), torch.ones(1, 1, 3, 3)], r"\(1, 1, 3, 3\), \(1, 2, 3, 3\); \(B, heads, T, T\)"),
        ([torch.ones(1, 2, 2, 2)], "for at least 3 units"),
    ):
        with pytest.raises(ValueError, match=words):
            draw_maps(weights, ["a", "b", "c"], tmp_path / "x.png")
    with pytest.raises(ValueError, match="example is 1; from 0 to 0"):
        draw_maps([torch.ones(1, 2, 3, 3)], ["a", "b", "c"], tmp_path / "x.png", example=1)
