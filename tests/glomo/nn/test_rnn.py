import pytest
import torch

from glomo.errors import UserError
from glomo.nn.rnn import RNNConfig, RNNTranslator

SOURCE_LENGTHS, LENGTHS = torch.tensor([7, 4, 2]), torch.tensor([6, 6, 3])


def make(**options):
    torch.manual_seed(2)
    return RNNTranslator(RNNConfig(**{"vocab_size": 30, "dim": 16, "dropout": 0.0, **options})).double()


def sequences(lengths):
    tokens = torch.randint(2, 30, (len(lengths), int(lengths.max())))
    return tokens * (torch.arange(tokens.size(1)) < lengths[:, None])


@pytest.mark.parametrize("options", [{}, dict(attention=False), dict(layers=2)])
def test_the_loss_is_of_each_sequence_alone(options):
    model = make(**options).eval()
    source, target = sequences(SOURCE_LENGTHS), sequences(LENGTHS)
    total = 0.0
    for row in range(3):
        x = model.embed(source[row : row + 1, : SOURCE_LENGTHS[row]])
        states, last = model.encoder(x)
        state = torch.stack([torch.cat([last[2 * i], last[2 * i + 1]], -1) for i in range(model.config.layers)])
        before = model.end
        for unit in [*target[row, : LENGTHS[row]].tolist(), model.end]:
            h, state = model.decoder(model.embed(torch.tensor([[before]])), state)
            h, before = h[0, 0], unit
            if model.scores is not None:
                weights = (model.scores(states[0]) @ h / 4).softmax(0)
                h = torch.cat([h, weights @ states[0]])
            z = model.embedding.weight @ model.mixed(h).tanh()
            total -= z[1:].log_softmax(0)[unit - 1]
    expected = total / int((LENGTHS + 1).sum())
    torch.testing.assert_close(model(source, SOURCE_LENGTHS, target, LENGTHS), expected)


@pytest.mark.parametrize("options", [{}, dict(attention=False), dict(layers=2)])
def test_decoding_step_by_step_is_decoding(options):
    model = make(**options).eval()
    source, target = sequences(SOURCE_LENGTHS), torch.randint(2, 30, (3, 6))
    states, start, allowed = model.encode(source, SOURCE_LENGTHS)
    inputs, _ = model.shifted(target, torch.full((3,), 6))
    expected = model.logits(model.read(model.decoder(model.embed(inputs), start)[0], states, allowed))
    expected = expected.float().log_softmax(-1)
    state, rows = model.start(source, SOURCE_LENGTHS), torch.tensor([0, 1, 2])
    for t in range(7):
        torch.testing.assert_close(state.step(inputs[rows, t]), expected[rows, t])
        if t == 3:
            state.select(torch.tensor([2, 0, 0]))
            rows = rows[torch.tensor([2, 0, 0])]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(dict(dim=15), "even"), (dict(layers=0), "model.layers is 0"), (dict(dropout=1.0), "model.dropout is 1.0")],
)
def test_bad_settings(options, sentence):
    with pytest.raises(UserError, match=sentence):
        RNNConfig(**options)
    assert RNNConfig(**RNNConfig(dim=32).to_dict()) == RNNConfig(dim=32)
