"""Merged weights compute what adapters do; unmerged ones are the original to the bit."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from glomo.nn import LanguageModel, TransformerConfig
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.transfer.structure import add, bottleneck, lora, merge, remove, unmerge

PLACES = "embedding|lstm|attention|convolution|head"


@pytest.fixture
def adapted(reader, stir):
    add(reader, PLACES, lora(2, 3.0))
    return stir(reader)


def originals(model):
    return {name: p for name, p in model.named_parameters() if ".adapter." not in name}


def test_merge_and_unmerge(adapted, units):
    before, weights = adapted(units), originals(adapted)
    values, names = copy.deepcopy(weights), list(adapted.state_dict())
    merge(adapted)
    torch.testing.assert_close(adapted(units), before, atol=1e-11, rtol=1e-11)
    assert not torch.equal(adapted.head.weight, values["head.weight"])
    merge(adapted)  # once is enough
    torch.testing.assert_close(adapted(units), before, atol=1e-11, rtol=1e-11)
    unmerge(adapted)
    assert all(parameter is weights[name] for name, parameter in originals(adapted).items())
    assert all(torch.equal(parameter, values[name]) for name, parameter in weights.items())
    assert torch.equal(adapted(units), before)
    assert list(adapted.state_dict()) == names
    unmerge(adapted)


def test_merged_for_good(adapted, reader, units):
    before = adapted(units)
    names = [name for name in adapted.state_dict() if ".adapter." not in name]
    modes = {name: p.requires_grad for name, p in originals(adapted.requires_grad_(False)).items()}
    merge(adapted, keep=False)
    torch.testing.assert_close(adapted(units), before, atol=1e-11, rtol=1e-11)
    assert list(adapted.state_dict()) == names
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in adapted.modules())
    with pytest.raises(ValueError, match="there is no adapter that can be merged"):
        merge(adapted)


def test_merged_and_then_for_good(adapted, units):
    before = adapted(units)
    merge(adapted)
    merge(adapted, keep=False)
    torch.testing.assert_close(adapted(units), before, atol=1e-11, rtol=1e-11)
    assert not any("adapter" in name for name in adapted.state_dict())


def test_the_adapters_cost_nothing_while_merged(adapted, units, monkeypatch):
    merge(adapted)
    for module in adapted.modules():
        monkeypatch.setattr(type(module), "change", None, raising=False)
        monkeypatch.setattr(type(module), "_sum", None, raising=False)
    adapted(units)


def test_several_on_one_module(reader, units, stir):
    original = reader.head.weight
    add(reader, "head", lora(2), "first")
    add(reader, "head", lora(3), "second")
    before = stir(reader)(units)
    merge(reader)
    torch.testing.assert_close(reader(units), before, atol=1e-11, rtol=1e-11)
    twin = copy.deepcopy(reader)
    unmerge(reader)
    assert reader.head.weight is original
    assert torch.equal(reader(units), before)
    remove(twin, "first")  # all of the module are unmerged first
    remove(reader, "first")
    assert torch.equal(twin(units), reader(units))


def test_removed_while_merged(reader, units, stir):
    before, weights = reader(units), dict(reader.named_parameters())
    add(reader, PLACES, lora(2))
    stir(reader)
    merge(reader)
    remove(reader)
    assert all(parameter is weights[name] for name, parameter in reader.named_parameters())
    assert torch.equal(reader(units), before)


def test_copied_and_restored_while_merged(adapted, reader, units, tmp_path):
    fresh = copy.deepcopy(adapted)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    before = adapted(units)
    merge(adapted)
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(units), adapted(units))
    unmerge(twin)
    assert torch.equal(twin(units), before)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*originals"):  # it would count twice
        fresh.load_state_dict(adapted.state_dict())
    merge(fresh)
    fresh.load_state_dict(adapted.state_dict())
    assert torch.equal(fresh(units), adapted(units))
    unmerge(fresh)
    assert torch.equal(fresh(units), before)


def test_tied_weights_are_parted(stir):
    net = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "decoder": nn.Linear(4, 7, bias=False)})
    net["decoder"].weight = net["embedding"].weight
    keys, units, x = list(net.state_dict()), torch.arange(7), torch.randn(3, 4)
    looked_up = net["embedding"](units)
    add(net, "decoder", lora(2))
    logits = stir(net)["decoder"](x)
    merge(net)
    assert torch.equal(net["embedding"](units), looked_up)
    torch.testing.assert_close(net["decoder"](x), logits)
    unmerge(net)
    assert net["decoder"].weight is net["embedding"].weight
    merge(net, keep=False)
    assert torch.equal(net["embedding"](units), looked_up)
    torch.testing.assert_close(net["decoder"](x), logits)
    assert list(net.state_dict()) == keys


def test_bf16_is_rounded_once():
    layer = nn.Linear(33, 17).bfloat16()
    add(layer, "", lora(4, 2.0))
    nn.init.normal_(layer.adapter.weight_b, std=0.05)
    w, a, b = (x.detach().double().numpy() for x in (layer.weight, layer.adapter.weight_a, layer.adapter.weight_b))
    exact = w + 0.5 * b @ a
    merge(layer)
    found = layer.weight.detach().double().numpy()
    nearest = torch.from_numpy(exact).bfloat16().double().numpy()
    assert (found == nearest).mean() > 0.99  # but where fp32 falls on the other side of the middle
    assert (np.abs(found - exact) <= np.abs(exact) * 2.0**-8 * 1.001).all()


@pytest.mark.parametrize("training", [True, False])
def test_others_stay_as_they_are(reader, units, stir, training):
    add(reader, "head", bottleneck(2), "bottleneck")
    add(reader, "head", lora(2))
    reader.train(training)
    before = stir(reader)(units)
    merge(reader, keep=False)
    torch.testing.assert_close(reader(units), before, atol=1e-11, rtol=1e-11)
    assert [name for name in reader.state_dict() if "adapter" in name] == []
    assert "bottleneck" in dict(reader.head.named_children())


def test_weights_that_make_logits_past_their_module(stir):
    """The logits of glomo's language models read the embedding's weight: merged, it would change them."""
    config = TransformerConfig.preset("tiny", vocab_size=9)
    for model, where in (
        (LanguageModel(config), "embedding"),
        (LSTMLanguageModel(AWDLSTMConfig.preset("tiny", vocab_size=9)), r"encoder\.embedding"),
    ):
        net = nn.ModuleDict({"model": model})
        add(net, rf"model\.{where}", lora(2))
        stir(net)
        with pytest.raises(ValueError, match="the embedding of 'model' has an adapter on what it looks up"):
            merge(net)
        assert not any("originals" in name for name in net.state_dict())


def test_recurrent_layers_after_a_merge(stir):
    """`nn.LSTM` remembers a list of its weights: it must be that of the merged, and then of the original ones."""
    layer = nn.LSTM(3, 4, 2).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    base = layer(x)[0]
    add(layer, "", lora(2))
    before = stir(layer)(x)[0]
    merge(layer)
    torch.testing.assert_close(layer(x)[0], before, atol=1e-11, rtol=1e-11)
    assert all(a is b for a, b in zip(layer._flat_weights, layer.all_weights[0] + layer.all_weights[1], strict=True))
    remove(layer)
    assert torch.equal(layer(x)[0], base)
