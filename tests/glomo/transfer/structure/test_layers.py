"""Layers of one network in another."""

import copy

import pytest
import torch
from torch import nn

from glomo.nn import LanguageModel, Transformer, TransformerConfig
from glomo.transfer.structure import chosen_layers, copy_layers, initialise_from_language_model


class Deep(nn.Module):
    def __init__(self, layers, width=4, bias=True):
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width, bias=bias), nn.BatchNorm1d(width)) for _ in range(layers)
        )
        self.head = nn.Linear(width, 3)


def test_every_second_layer_of_a_teacher():
    teacher, student = Deep(6), Deep(3)
    teacher.layers[4][1].running_mean.fill_(3.0)
    before = copy.deepcopy(student.head.state_dict())
    found = copy_layers(teacher, student, {"embedding": "embedding", **chosen_layers("layers", range(0, 6, 2))})
    for new, old in enumerate((0, 2, 4)):
        for name, value in student.layers[new].state_dict().items():
            assert torch.equal(value, teacher.layers[old].state_dict()[name])
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    assert all(torch.equal(value, before[name]) for name, value in student.head.state_dict().items())
    assert found.new == ("head.weight", "head.bias")
    assert set(found.copied) | set(found.new) == set(student.state_dict())
    student.layers[0][0].weight.data.zero_()
    assert teacher.layers[0][0].weight.any()  # a copy


def test_names_of_layers():
    assert chosen_layers("a.b", [5, 1]) == {"a.b.5": "a.b.0", "a.b.1": "a.b.1"}
    assert chosen_layers("layers", [3], into="blocks") == {"layers.3": "blocks.0"}
    assert chosen_layers("layers", []) == {}


def test_prefixes_are_whole_names_and_dtypes_stay():
    source, target = nn.ModuleDict({f"{n}": nn.Linear(2, 2) for n in (1, 10)}).double(), Deep(1, width=2).bfloat16()
    found = copy_layers(source.state_dict(), target, {"1": "layers.0.0"})
    assert found.copied == ("layers.0.0.weight", "layers.0.0.bias")
    assert torch.equal(target.layers[0][0].weight, source["1"].weight.bfloat16())
    alone = nn.Linear(2, 2)
    assert copy_layers(source["10"], alone, {"": ""}).new == ()
    assert torch.equal(alone.bias, source["10"].bias.float())
    assert copy_layers(alone, target, {"": "layers.0.0", "weight": "layers.0.0.weight"}).copied == found.copied


def test_what_only_the_target_has_stays_new():
    found = copy_layers(Deep(1, bias=False), Deep(1), {"layers": "layers"})
    assert found.new == ("embedding.weight", "layers.0.0.bias", "head.weight", "head.bias")


def test_a_shared_weight_is_copied_under_all_its_names():
    net = Deep(1)
    net.logits = nn.Linear(4, 7, bias=False)
    net.logits.weight = net.embedding.weight
    found = copy_layers(Deep(1), net, {"embedding": "embedding"})
    assert found.copied == ("embedding.weight", "logits.weight")


def test_layers_of_one_network_are_moved_at_once():
    net = Deep(3)
    before = copy.deepcopy(net.layers)
    copy_layers(net, net, {"layers.0": "layers.1", "layers.1": "layers.2"})
    for new, old in ((0, 0), (1, 0), (2, 1)):
        assert torch.equal(net.layers[new][0].weight, before[old][0].weight)


def test_mistakes_copy_nothing():
    target = Deep(2)
    state = copy.deepcopy(target.state_dict())
    for source, prefixes, message in [
        (Deep(2, 5), {"head": "head"}, r"'head.weight' of the source is \(3, 5\), and 'head.weight' .* \(3, 4\)"),
        (Deep(3), {"embedding": "embedding", "layers": "layers"}, r"'layers.2.0.weight', and the target no 'layers.2"),
        (Deep(2), {"embedding": "embedding", "layer": "layers"}, "the source has nothing under 'layer'; it has embed"),
        (Deep(2), {"layers.0": "layers.0", "layers.1": "layers.0"}, r"would be both 'layers.0.0.weight' and 'layers.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            copy_layers(source, target, prefixes)
        assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())


def config(**settings):
    return TransformerConfig.preset("tiny", **{"vocab_size": 13, "dim": 8, "ff": 12, "layers": 2, **settings})


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "relative"])
@pytest.mark.parametrize("kind", ["softmax", "relu2"])
def test_an_encoder_decoder_from_a_language_model(norm, positions, kind):
    settings = config(norm=norm, positions=positions, decoder_attention=(kind,), encoder_attention=(kind,))
    language_model, transformer = LanguageModel(settings), Transformer(settings)
    for parameter in language_model.parameters():
        nn.init.normal_(parameter)
    given = language_model.state_dict()
    before = copy.deepcopy(transformer.state_dict())
    found = initialise_from_language_model(transformer, language_model)
    state = transformer.state_dict()
    new = {n for n in state if ".over_memory." in n or (n.startswith("decoder.layers") and ".norms.1." in n)}
    assert set(found.new) == new
    assert len(new) == 2 * 8
    assert set(found.copied) | new == set(state)
    for name, value in state.items():
        if name in new:
            assert torch.equal(value, before[name])
        elif name.startswith("encoder."):
            assert torch.equal(value, given[name.replace("encoder.", "decoder.", 1)])
        else:
            assert torch.equal(value, given[name.replace(".norms.2.", ".norms.1.")])


def test_the_decoder_computes_what_the_language_model_does():
    """With nothing read from the encoder, and where the new LayerNorm has nothing to do (it comes first: pre)."""
    settings = config(norm="pre", dropout=0.0)
    language_model, transformer = LanguageModel(settings).eval(), Transformer(settings).eval()
    for parameter in language_model.parameters():
        nn.init.normal_(parameter, std=0.5)
    initialise_from_language_model(transformer, language_model)
    for layer in transformer.decoder.layers:
        nn.init.zeros_(layer.over_memory.out.weight)
    units, lengths = torch.randint(1, 13, (2, 5)), torch.tensor([5, 5])
    inputs, outputs = language_model.shifted(units, lengths)
    torch.testing.assert_close(transformer(units, lengths, units, lengths), language_model(inputs, outputs))


def test_fewer_and_more_layers():
    language_model, transformer = LanguageModel(config(layers=1)), Transformer(config(layers=3))
    found = initialise_from_language_model(transformer, language_model)
    assert {name.split(".")[2] for name in found.new if name.startswith("encoder.layers")} == {"1", "2"}
    assert torch.equal(transformer.encoder.layers[0].inner.weight, language_model.decoder.layers[0].inner.weight)
    deep, shallow = LanguageModel(config(layers=3)), Transformer(config(layers=1))
    found = initialise_from_language_model(shallow, deep)
    assert not any(name.startswith("encoder") for name in found.new)


def test_settings_that_differ():
    for own, given, message in [
        ({"dim": 8}, {"dim": 12}, "dim of the Transformer is 8, and of the language model 12"),
        ({"vocab_size": 5}, {}, "vocab_size of the Transformer is 5, and of the language model 13"),
        ({"heads": 4}, {}, "heads of the Transformer is 4, and of the language model 2"),
        ({"ff": 6}, {}, "ff of the Transformer is 6, and of the language model 12"),
        ({"norm": "pre"}, {}, "norm of the Transformer is pre, and of the language model post"),
        ({"positions": "learned"}, {}, "positions of the Transformer is learned, and of the language model sinusoidal"),
        (
            {"positions": "learned", "max_length": 9},
            {"positions": "learned"},
            "max_length of the Transformer is 9, and of the language model 1024",
        ),
        (
            {"encoder_attention": ("relu2", "softmax")},
            {},
            "encoder_attention of the first 2 layers of the Transformer is relu2, softmax, and .* softmax, softmax",
        ),
    ]:
        transformer = Transformer(config(**own))
        before = copy.deepcopy(transformer.state_dict())
        with pytest.raises(ValueError, match=message):
            initialise_from_language_model(transformer, LanguageModel(config(**given)))
        assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
