"""Every parameter is in exactly one group, or a sentence says which is not."""

import pytest
import torch
from support_transfer import PATTERNS, net_and_groups
from torch import nn

from glomo.transfer import layer_groups


def test_bottom_to_top_and_complete():
    net, groups = net_and_groups()
    assert [group.name for group in groups] == ["embedding", "layers.0", "layers.1", "head"]
    names = [name for group in groups for name in group.parameters]
    assert names == [name for name, _ in net.named_parameters()]
    assert sum(group.size for group in groups) == sum(p.numel() for p in net.parameters())


def test_numbers_in_their_order():
    net = nn.ModuleDict({f"layer{n}": nn.Linear(1, 1) for n in (10, 2, 0)})
    assert [g.name for g in layer_groups(net, [r"layer(\d+)"])] == ["layer0", "layer2", "layer10"]


def test_names_of_ones_own():
    net, _ = net_and_groups()
    named = layer_groups(net, {"bottom": "embedding", "layer": r"layers\.(\d+)", "top": "head"})
    assert [group.name for group in named] == ["bottom", "layer.0", "layer.1", "top"]


def test_a_pattern_ends_at_a_dot():
    net = nn.ModuleDict({"embedding": nn.Linear(1, 1), "embedding_norm": nn.LayerNorm(1)})
    assert [len(g.parameters) for g in layer_groups(net, ["embedding", "embedding_norm"])] == [2, 2]


def test_shared_parameters_count_once():
    net = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    net["head"].weight = net["embedding"].weight
    assert [list(g.parameters) for g in layer_groups(net, ["embedding", "head"])] == [
        ["embedding.weight"],
        ["head.bias"],
    ]


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        (PATTERNS[:2], "in no group: head.weight, head.bias"),
        ([*PATTERNS, r"head\.bias"], r"in several groups: head.bias \(by 'head' and 'head\\\\.bias'\)"),
        ([*PATTERNS, "hed"], "patterns that match no parameter: 'hed'"),
        (["("], r"'\(' is no regular expression"),
        ({"layer": r"layers\.(\d+)", "layer.0": "embedding", "top": "head"}, "two layer groups are called 'layer.0'"),
        ([], r"in no group: embedding.weight, .* and 6 more"),
    ],
)
def test_mistakes(patterns, sentence):
    with pytest.raises(ValueError, match=sentence):
        layer_groups(net_and_groups()[0], patterns)


def test_parameters_are_the_models_own():
    net, groups = net_and_groups()
    with torch.no_grad():
        for parameter in groups[-1].parameters.values():
            parameter.zero_()
    assert not net.head.weight.any()
