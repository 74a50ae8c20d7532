"""Features against what the modules return when they are called by hand."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.transfer.probing import layer_features


class Tagger(nn.Module):
    """Has an in-place module, one that runs twice, one whose output is a tuple and one that never runs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.shared = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)
        self.rnn = nn.LSTM(6, 5, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, units, scale=1.0):
        x = self.shared(self.relu(self.shared(self.embedding(units) * scale)))
        return self.head(self.drop(self.rnn(x)[0]).mean(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tagger()


BATCHES = [torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0]]), torch.tensor([[8, 0], [9, 10], [11, 12]])]
LENGTHS = [torch.tensor([3, 2]), torch.tensor([1, 2, 2])]


def rows(model, batch, lengths):
    """LSTM outputs of real units, by hand."""
    model.eval()
    with torch.no_grad():
        out = model.rnn(model.shared(torch.relu(model.shared(model.embedding(batch)))))[0]
    return [out[i, :n] for i, n in enumerate(lengths.tolist())]


def test_units_and_pools(model):
    expected = [x for batch, n in zip(BATCHES, LENGTHS, strict=True) for x in rows(model, batch, n)]
    found = layer_features(model, ["rnn"], BATCHES, LENGTHS)["rnn"]
    torch.testing.assert_close(found, torch.cat(expected))
    for pool, of in (
        ("mean", lambda x: x.sum(0) / len(x)),
        ("last", lambda x: x[-1]),
        ("max", lambda x: x.max(0).values),
    ):
        pooled = layer_features(model, ["rnn"], BATCHES, LENGTHS, pool=pool)["rnn"]
        torch.testing.assert_close(pooled, torch.stack([of(x) for x in expected]))


def test_without_lengths_and_with_several_arguments(model):
    found = layer_features(model, ["head"], [(batch, 2.0) for batch in BATCHES])["head"]
    named = layer_features(model, ["head"], [{"units": batch, "scale": 2.0} for batch in BATCHES])["head"]
    model.eval()
    torch.testing.assert_close(found, torch.cat([model(batch, 2.0) for batch in BATCHES]).detach())
    assert torch.equal(found, named)
    assert not found.requires_grad


def test_in_place_modules_do_not_reach_back(model):
    found = layer_features(model, ["shared", "relu"], BATCHES[:1])
    assert list(found) == ["shared", "shared (2)", "relu"]
    assert (found["shared"] < 0).any()
    torch.testing.assert_close(found["shared"], model.shared(model.embedding(BATCHES[0])).detach())
    torch.testing.assert_close(found["relu"], found["shared"].relu())
    torch.testing.assert_close(found["shared (2)"], model.shared(found["relu"]).detach())


def test_all_takes_what_fits(model):
    assert set(layer_features(model, "all", BATCHES, LENGTHS)) == {
        *("embedding", "shared", "shared (2)", "relu", "rnn", "drop")
    }
    assert "head" in layer_features(model, "all", BATCHES[:1])


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_hooks_are_as_before(model, fails):
    model.train()
    model.rnn.eval()
    before = {name: module.training for name, module in model.named_modules()}
    if fails:
        with pytest.raises(IndexError):
            layer_features(model, "all", [BATCHES[0], torch.tensor([[99]])])
    else:
        once = layer_features(model, ["drop"], BATCHES, LENGTHS)["drop"]
        assert torch.equal(once, layer_features(model, ["drop"], BATCHES, LENGTHS)["drop"])
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


def test_batch_mates_and_padding_do_not_matter(model):
    alone = layer_features(model, ["rnn"], [BATCHES[0][:1, :3]], [LENGTHS[0][:1]], pool="mean")["rnn"]
    torch.testing.assert_close(layer_features(model, ["rnn"], BATCHES, LENGTHS, pool="mean")["rnn"][:1], alone)


def test_time_major_and_mappings():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()
            self.wrapped = Wrapped()

        def forward(self, x):
            return self.wrapped(self.inner(x))

    class Wrapped(nn.Module):
        def forward(self, x):
            return OrderedDict(hidden=(x + 1, None), other=x)

    x = torch.randn(4, 2, 3)  # (T, B, dim)
    found = layer_features(Model(), ["inner", "wrapped"], [x], [torch.tensor([2, 4])], batch_first=False)
    expected = torch.cat([x[:2, 0], x[:, 1]])
    assert torch.equal(found["inner"], expected)
    assert torch.equal(found["wrapped"], expected + 1)


def test_half_precision_means_are_added_in_single():
    model = nn.Sequential(nn.Identity())
    x = torch.ones(1, 3000, 1, dtype=torch.bfloat16)
    x[:, :1104] = 1.03125
    found = layer_features(model, ["0"], [x], [torch.tensor([3000])], pool="mean")["0"]
    assert found.dtype == torch.bfloat16
    assert float(found) == 1.0078125  # of 1.0115; a sum in bf16 is a multiple of 16


def test_glomos_language_models():
    units = torch.tensor([[3, 4, 5], [6, 7, 0]])
    model = LanguageModel(TransformerConfig.preset("tiny", vocab_size=20))
    found = layer_features(
        model, ["decoder.layers.0", "decoder.layers.1"], [units], [torch.tensor([3, 2])], forward=model.hidden
    )
    model.eval()
    _, first, last = model.layers(units)
    real = units != 0
    torch.testing.assert_close(found["decoder.layers.0"], first[real].detach())
    torch.testing.assert_close(found["decoder.layers.1"], last[real].detach())
    lstm = LSTMLanguageModel(AWDLSTMConfig.preset("tiny", vocab_size=20))
    found = layer_features(lstm, ["encoder"], [units], [torch.tensor([3, 2])], forward=lstm.encoder)
    torch.testing.assert_close(found["encoder"], lstm.eval().encoder(units).raw[real].detach())


def test_pytorchs_encoder_with_padding():
    """In evaluation it would make nested tensors of a padded batch, and go past its own submodules."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    x, lengths = torch.randn(2, 5, 8), torch.tensor([5, 3])
    padding = torch.arange(5) >= lengths[:, None]
    batch = {"src": x, "src_key_padding_mask": padding}
    found = layer_features(model, ["layers.0.linear1", "layers.1"], [batch], [lengths])
    assert found["layers.0.linear1"].shape == (8, 16)
    alone = layer_features(model, ["layers.1"], [x[1:, :3]], [lengths[1:]])["layers.1"]
    torch.testing.assert_close(found["layers.1"][5:], alone)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(modules=["rnm"]), ValueError, r"no module 'rnm'; its modules are embedding, shared, relu"),
        (dict(modules="rnn"), TypeError, "modules is the text 'rnn'"),
        (dict(modules=["idle"]), ValueError, "the module idle ran in 0 of 2 batches"),
        (dict(modules=["head"]), ValueError, r"the output of head is \(3, 3\); \(3, 2 or more, dim\) is needed"),
        (dict(lengths=LENGTHS[:1]), ValueError, "lengths for 1 batches, but more batches"),
        (dict(lengths=[*LENGTHS, LENGTHS[0]]), ValueError, "2 batches, but lengths for more"),
        (dict(lengths=[torch.tensor([3, 0])] * 2), ValueError, r"lengths of batch 1 are \[3, 0\]"),
        (dict(lengths=[torch.tensor([5, 1])] * 2), ValueError, r"\(2, 5 or more, dim\) is needed"),
        (dict(lengths=None), ValueError, "one shape, or the lengths of the sequences, are needed"),
        (dict(lengths=None, pool="mean"), ValueError, "pool is 'mean', which needs the lengths"),
        (dict(pool="median"), ValueError, "pool is 'median'"),
        (dict(batches=[], lengths=[]), ValueError, "no batch"),
    ],
)
def test_mistakes(model, options, error, words):
    given = {"modules": ["rnn"], "batches": BATCHES, "lengths": LENGTHS, **options}
    with pytest.raises(error, match=words):
        layer_features(model, **given)
