"""Adapters in models of Hugging Face, small and random."""

import copy

import pytest
import torch

from glomo.transfer import freeze_all_but_top, layer_groups, optimizer_groups
from glomo.transfer.structure import (
    adapter_patterns,
    add,
    bottleneck,
    load_adapters,
    lora,
    merge,
    projected_attention,
    remove,
    save_adapters,
)

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture
def batch():
    ids = torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(6) < torch.tensor([6, 4, 2])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def adapted(bert):
    found = add(bert, r".*\.attention\.self\.(?:query|value)", lora(2))
    assert found == [f"bert.encoder.layer.{n}.attention.self.{kind}" for n in (0, 1) for kind in ("query", "value")]
    # after the attention's projection and after the feed-forward layer, before the residual
    assert len(add(bert, r"bert\.encoder\.layer\.\d\.(?:attention\.)?output\.dense", bottleneck(3))) == 4
    return bert


def test_training_saving_and_merging(bert, batch, stir, tmp_path):
    base, labels = copy.deepcopy(bert), torch.tensor([0, 1, 2])
    before = bert(**batch).logits
    adapted(bert)
    torch.testing.assert_close(bert(**batch).logits, before, atol=1e-3, rtol=1e-3)  # near the identity
    groups = layer_groups(bert, adapter_patterns(bert, "classifier", also=r".*\.LayerNorm"))
    optimizer = torch.optim.AdamW(optimizer_groups(groups, 1e-2))
    state = copy.deepcopy(bert.state_dict())
    for stage in freeze_all_but_top(groups, 2, 1e-2, count=2):
        stage.begin(bert, groups, optimizer)
        for step in range(2):
            stage.set_modes(bert)
            stage.set_rates(optimizer, step)
            optimizer.zero_grad()
            bert(**batch, labels=labels).loss.backward()
            optimizer.step()
    moved = {name for name, value in bert.state_dict().items() if not torch.equal(value, state[name])}
    assert moved == {n for n in state if ".adapter." in n or "LayerNorm" in n or "classifier" in n}
    stir(bert)
    after = bert.eval()(**batch).logits
    save_adapters(bert, tmp_path / "task.safetensors", ["classifier", r".*\.LayerNorm"])
    load_adapters(base, tmp_path / "task.safetensors")
    assert torch.equal(base(**batch).logits, after)
    merge(base, keep=False)
    torch.testing.assert_close(base(**batch).logits, after, atol=1e-5, rtol=1e-5)


def test_projected_attention_does_not_read_padding(bert, batch, stir):
    before = bert(**batch).logits
    add(bert, r"bert\.encoder\.layer\.\d", projected_attention(6, 2, into="output.dropout", width=12))
    stir(bert)
    both = bert(**batch).logits
    assert not torch.allclose(both, before)
    for implementation in ("sdpa", "eager"):
        bert.set_attn_implementation(implementation)
        for row, length in enumerate((6, 4, 2)):
            alone = bert(**{name: value[row : row + 1, :length] for name, value in batch.items()}).logits
            torch.testing.assert_close(alone, both[row : row + 1], atol=1e-5, rtol=1e-5)
    remove(bert)
    torch.testing.assert_close(bert(**batch).logits, before, atol=1e-6, rtol=1e-5)


def test_a_tied_decoder(stir):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model, ids = transformers.BertForMaskedLM(config).eval(), torch.randint(1, 30, (2, 5))
    embedding, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is decoder.weight
    looked_up = embedding(ids)
    add(model, r"cls\.predictions\.decoder", lora(2))
    logits = stir(model)(ids).logits
    merge(model)
    assert torch.equal(embedding(ids), looked_up)
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)


def test_a_decoder_with_a_cache_is_refused(stir):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30, n_embd=12, n_layer=2, n_head=2, n_positions=16)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(1, 30, (1, 5))
    add(model, r"transformer\.h\.\d", projected_attention(6, 2, causal=True, width=12))
    stir(model)
    other = ids.clone()
    other[:, 3:] = 1
    torch.testing.assert_close(model(ids).logits[:, :3], model(other).logits[:, :3])  # causal
    first = model(ids, use_cache=True)
    with pytest.raises(ValueError, match="it cannot go on from a cache"):
        model(ids[:, :1], past_key_values=first.past_key_values, use_cache=True)
