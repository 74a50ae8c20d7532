import copy
import dataclasses
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTM, AWDLSTMConfig, LSTMLanguageModel
from glomo.nn.decoding import beam_search, greedy
from glomo.nn.recurrent_dropout import WeightDropLSTM, in_one_piece, variational_dropout

LENGTHS = torch.tensor([6, 4, 1])


def settings(**options):
    return AWDLSTMConfig.preset(
        "tiny", **{"vocab_size": 11, "dim": 6, "hidden": 5, "layers": 3, "dropout_embedding": 0.3, **options}
    )


def make(**options):
    """A model in fp64 whose parameters all count."""
    torch.manual_seed(2)
    model = LSTMLanguageModel(settings(**options)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.encoder.embedding.weight.data[0] = 0
    return model


def texts():
    torch.manual_seed(3)
    return tuple(torch.randint(2, 12, (3, 6)) * (torch.arange(6) < LENGTHS[:, None]) for _ in range(2))


def states(model, batch=3):
    widths = [layer.hidden_size for layer in model.encoder.layers]
    return [tuple(torch.randn(2, 1, batch, width, dtype=torch.float64)) for width in widths]


def lstm_by_hand(layer, recurrent, x, h, c):
    """The cell's equations, sequence by sequence and step by step."""
    width, rows, ends = layer.hidden_size, [], []
    for b in range(len(x)):
        hb, cb, outs = h[b], c[b], []
        for t in range(x.size(1)):
            z = layer.weight_ih_l0 @ x[b, t] + layer.bias_ih_l0 + recurrent @ hb + layer.bias_hh_l0
            i, f, g, o = (z[n * width : (n + 1) * width] for n in range(4))
            cb = torch.sigmoid(f) * cb + torch.sigmoid(i) * torch.tanh(g)
            hb = torch.sigmoid(o) * torch.tanh(cb)
            outs.append(hb)
        rows.append(torch.stack(outs))
        ends.append((hb, cb))
    return torch.stack(rows), ends


def mask(p, *shape):
    return F.dropout(torch.ones(*shape, dtype=torch.float64), p)


def training_by_hand(model, inputs, outputs, state):
    """(loss, nats, h and c after the last step): each mask is drawn when its turn comes, as in the model."""
    config, table = model.config, model.encoder.embedding.weight
    rows = table * mask(config.dropout_embedding, len(table))[:, None]
    raw = rows[inputs]
    x = raw * mask(config.dropout_input, len(raw), 1, raw.size(-1))
    for number, layer in enumerate(model.encoder.layers):
        recurrent = layer.weight_hh_l0 * mask(config.weight_drop, *layer.weight_hh_l0.shape)
        raw, ends = lstm_by_hand(layer, recurrent, x, *(s[0] for s in state[number]))
        p = config.dropout_output if number == config.layers - 1 else config.dropout_hidden
        x = raw * mask(p, len(raw), 1, raw.size(-1))
    nats, squares, changes = [], [], []
    for b in range(len(inputs)):
        for t in range(inputs.size(1)):
            if outputs[b, t] == 0:
                continue
            z = (table @ x[b, t] + model.decoder.bias)[1:]
            nats.append(torch.logsumexp(z, 0) - z[outputs[b, t] - 1])
            squares += list(x[b, t] ** 2)
            if t and outputs[b, t - 1] != 0:
                changes += list((raw[b, t] - raw[b, t - 1]) ** 2)
    nats = sum(nats) / len(nats)
    penalty = config.activation_reg * sum(squares) / len(squares) + config.temporal_reg * sum(changes) / len(changes)
    return nats + penalty, nats, ends


def test_training_is_the_formulas():
    """Every dropout, both regularisers and the tied logits, in value and in the gradient of every parameter."""
    model = make(**dict.fromkeys(("dropout_input", "dropout_hidden", "dropout_output", "weight_drop"), 0.4))
    inputs, outputs = texts()
    outputs[0, 2] = 0  # nothing is asked there
    state = states(model)
    torch.manual_seed(5)
    loss, nats, after = model(inputs, outputs, state)
    torch.manual_seed(5)
    expected_loss, expected_nats, ends = training_by_hand(model, inputs, outputs, state)
    torch.testing.assert_close(nats, expected_nats)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(after[-1][0][0], torch.stack([h for h, _ in ends]).detach())
    torch.testing.assert_close(after[-1][1][0], torch.stack([c for _, c in ends]).detach())
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()))
    expected = list(torch.autograd.grad(expected_loss, list(parameters.values())))
    expected[0][0] = 0  # padding's row is no parameter
    for name, mine, other in zip(parameters, found, expected, strict=True):
        torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}")


def test_without_training_it_is_a_plain_lstm():
    model, (inputs, outputs) = make().eval(), texts()
    loss, nats, state = model(inputs, outputs)
    hidden = model.encoder.embedding(inputs)
    for layer in model.encoder.layers:
        plain = nn.LSTM(layer.input_size, layer.hidden_size, batch_first=True).double()
        plain.load_state_dict(layer.state_dict())
        hidden, _ = plain(hidden)
    logits = model.logits(hidden)
    assert (logits[..., 0] == float("-inf")).all()
    torch.testing.assert_close(nats, F.cross_entropy(logits.flatten(0, 1), outputs.flatten(), ignore_index=0))
    assert loss == nats == model(inputs, outputs)[0]
    encoded = model.encoder(inputs)
    assert encoded.raw is encoded.dropped is encoded.layers[-1]
    assert [x.size(-1) for x in encoded.layers] == [6, 5, 5, 6]
    assert len(state) == 3


def test_the_weights_in_use_are_new_ones_every_time():
    """And none in eval; the first step of a zero state does not see them."""
    torch.manual_seed(0)
    layer, x = WeightDropLSTM(4, 30, 0.5), torch.randn(2, 3, 4)
    first, second = layer(x)[0], layer(x)[0]
    torch.testing.assert_close(first[:, 0], second[:, 0])
    assert (first[:, 1:] != second[:, 1:]).any()
    layer.eval()
    torch.testing.assert_close(layer(x)[0], layer(x)[0], rtol=0, atol=0)
    torch.testing.assert_close(layer(x)[0][:, 0], first[:, 0])
    assert (WeightDropLSTM(4, 30, 0.0)(x)[0][:, 1:] != first[:, 1:]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_raw_weight_is_the_parameter_and_gets_the_gradient(dtype):
    """In fp32 too, where the CPU has kernels of its own."""
    torch.manual_seed(0)
    layer, x = WeightDropLSTM(4, 30, 0.5).to(dtype), torch.randn(2, 3, 4, dtype=dtype)
    before = copy.deepcopy(layer.state_dict())
    assert set(before) == {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}
    torch.manual_seed(1)
    out, _ = layer(x)
    out.square().sum().backward()
    torch.manual_seed(1)
    dropped = F.dropout(layer.weight_hh_l0.detach(), 0.5)
    plain = nn.LSTM(4, 30, batch_first=True).to(dtype)
    plain.load_state_dict({**before, "weight_hh_l0": dropped})
    expected, _ = plain(x)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer.weight_ih_l0.grad, plain.weight_ih_l0.grad)
    torch.testing.assert_close(layer.weight_hh_l0.grad, plain.weight_hh_l0.grad * (dropped != 0) * 2)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])  # nothing is zeroed for good


def test_nothing_of_a_call_stays_in_the_module():
    model, (inputs, outputs) = make(weight_drop=0.5), texts()
    loss, _, state = model(inputs, outputs)
    for layer in model.encoder.layers:
        own = {id(p) for p in layer.parameters()}
        assert len(own) == 4
        assert {id(weight) for weight in layer._flat_weights} == own
    assert not any(x.requires_grad for pair in state for x in pair)
    twin = copy.deepcopy(model)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in twin.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert twin(inputs, outputs)[0] > 0  # its own weights
    single = twin.to(torch.float32)
    single(inputs, outputs)[0].backward()
    saved = io.BytesIO()
    torch.save(single.state_dict(), saved)
    saved.seek(0)
    loaded = LSTMLanguageModel(single.config)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    torch.testing.assert_close(loaded.eval()(inputs, outputs)[0], single.eval()(inputs, outputs)[0])


def test_weights_in_one_piece():
    weights = [torch.randn(4, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True), torch.randn(4)]
    pieces = in_one_piece(weights)
    place = pieces[0].data_ptr()
    for piece, weight in zip(pieces, weights, strict=True):
        assert torch.equal(piece, weight)
        assert piece.is_contiguous()
        assert piece.data_ptr() == place
        place += piece.numel() * piece.element_size()
    pieces[1].square().sum().backward()
    torch.testing.assert_close(weights[1].grad, 2 * weights[1].detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: what cuDNN warns of")
def test_no_warning_of_scattered_weights(recwarn):
    layer = WeightDropLSTM(4, 30, 0.5).cuda()
    for _ in range(2):
        layer(torch.randn(2, 3, 4, device="cuda"))[0].sum().backward()
    assert not [w for w in recwarn if "contiguous" in str(w.message)]


def test_one_mask_for_all_steps():
    torch.manual_seed(0)
    x = torch.rand(40, 7, 50) + 1
    out = variational_dropout(x, 0.3, True)
    kept = out[:, 0] != 0
    torch.testing.assert_close(out, x * kept[:, None] / 0.7)
    assert abs(float(kept.float().mean()) - 0.7) < 0.05
    assert (kept[0] != kept[1]).any()
    assert variational_dropout(x, 0.3, False) is variational_dropout(x, 0.0, True) is x


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation makes, views left out."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_words_are_dropped_without_a_copy_of_the_embeddings():
    torch.manual_seed(0)
    encoder = AWDLSTM(AWDLSTMConfig.preset("tiny", vocab_size=5000, dropout_embedding=0.5))
    units = torch.arange(2, 22).repeat(2, 3)
    with Largest() as made:
        embedded = encoder(units).layers[0]
    assert made.numbers < 5001 * 32 / 10
    kept = (embedded != 0).any(-1)
    assert torch.equal(kept, kept[:1, :20].repeat(2, 3))  # a word goes everywhere, or stays everywhere
    assert 0 < int(kept[0, :20].sum()) < 20
    assert (encoder.eval()(units).layers[0] != 0).any(-1).all()


def test_state_carries_a_text_on():
    model, (inputs, _) = make().eval(), texts()
    inputs = inputs.clamp(min=2)
    whole = model.encoder(inputs)
    first = model.encoder(inputs[:, :4])
    second = model.encoder(inputs[:, 4:], first.state)
    torch.testing.assert_close(torch.cat([first.raw, second.raw], 1), whole.raw)
    for pair, other in zip(second.state, whole.state, strict=True):
        torch.testing.assert_close(pair, other)
    with pytest.raises(ValueError, match="3 layers and 3 sequences; 3 layers and 2 sequences are needed"):
        model.encoder(inputs[:2], first.state)
    with pytest.raises(ValueError, match="2 layers and 3 sequences; 3 layers"):
        model.encoder(inputs, first.state[:2])


def test_padding_changes_nothing():
    """The loss of a batch is that of its sequences alone, and no unit sees what stands behind it."""
    model, (inputs, outputs) = make(**dict.fromkeys(("weight_drop", "dropout_embedding"), 0.0)), texts()
    total = 0.0
    for row, n in enumerate(LENGTHS.tolist()):
        total += model.eval()(inputs[row : row + 1, :n], outputs[row : row + 1, :n])[1] * n
    torch.testing.assert_close(model(inputs, outputs)[1], total / LENGTHS.sum())
    changed = torch.where(inputs == 0, 7, inputs)
    torch.testing.assert_close(model(changed, outputs)[1], model(inputs, outputs)[1])
    model.train()
    torch.manual_seed(4)
    loss = model(inputs, outputs)[0]
    torch.manual_seed(4)
    torch.testing.assert_close(model(changed, outputs)[0], loss)


def test_nothing_but_padding():
    model = make()
    nothing = torch.zeros(2, 3, dtype=torch.int64)
    loss, nats, _ = model(nothing, nothing)
    loss.backward()
    assert loss == nats == 0
    assert all((p.grad == 0).all() for p in model.parameters())
    one = model(torch.tensor([[5]]), torch.tensor([[6]]))[0]  # no pair of neighbours
    assert one.isfinite()


def test_padding_stays_zero_and_the_matrix_is_shared():
    model, (inputs, outputs) = make(), texts()
    optimizer = torch.optim.SGD(model.parameters(), 1.0, weight_decay=0.1)
    model(inputs, outputs)[0].backward()
    optimizer.step()
    assert (model.encoder.embedding.weight[0] == 0).all()
    names = [name for name, _ in model.named_parameters()]
    assert names[0] == "encoder.embedding.weight"
    assert names[-1] == "decoder.bias"
    assert all(name.startswith(f"encoder.layers.{n // 4}.") for n, name in enumerate(names[1:-1]))


def test_decoding_step_by_step_is_decoding():
    model, (inputs, _) = make().eval(), texts()
    inputs = inputs.clamp(min=2)
    expected = model.logits(model.encoder(inputs).raw).log_softmax(-1)
    state, rows = model.start(), torch.arange(3)
    state.select(rows)  # before anything was read
    for t in range(6):
        torch.testing.assert_close(state.step(inputs[rows, t]), expected[rows, t])
        if t == 3:
            rows = rows[torch.tensor([2, 0, 0])]
            state.select(torch.tensor([2, 0, 0]))
    assert len(greedy(model.start(), 2, model.end, 5)) == len(beam_search(model.start(), 2, model.end, 5)) == 2


def test_learns_what_a_state_must_carry():
    """Read unit by unit, nothing but the carried state tells where in the cycle a text is: without it 0.55 nats are
    the best."""
    torch.manual_seed(0)
    model = LSTMLanguageModel(AWDLSTMConfig.preset("tiny", vocab_size=8))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    cycle = torch.tensor([2, 2, 2, 3, 3, 4])
    units = torch.stack([cycle.roll(n).repeat(70) for n in range(6)])
    state = None
    for start in range(0, 400, 4):
        loss, _, state = model(units[:, start : start + 4], units[:, start + 1 : start + 5], state)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = None
    with torch.no_grad():
        for t in range(30):
            _, nats, state = model.eval()(units[:, t : t + 1], units[:, t + 1 : t + 2], state)
    assert nats < 0.1


def test_autocast():
    model, (inputs, outputs) = make().float(), texts()
    exact = model.eval()(inputs, outputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(inputs, outputs)[0] / exact - 1).abs() < 0.02
        model.train()(inputs, outputs)[0].backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_settings():
    config = settings(weight_drop=0.3)
    assert AWDLSTMConfig.from_dict(config.to_dict()) == config
    merity = AWDLSTMConfig.preset("merity", vocab_size=33_277)
    with torch.device("meta"):
        model = LSTMLanguageModel(merity)
    assert sum(p.numel() for p in model.parameters()) == 33_556_078  # as published for WikiText-2
    assert AWDLSTMConfig.preset("ulmfit") == AWDLSTMConfig()
    doubled = merity.scaled(2)
    assert (doubled.dropout_input, doubled.dropout_hidden, doubled.weight_drop) == (0.99, 0.6, 0.99)
    assert dataclasses.replace(doubled, **{k: v for k, v in vars(merity).items() if "drop" in k}) == merity
    assert merity.scaled(0).dropout_output == 0
    assert [layer.hidden_size for layer in AWDLSTM(settings(layers=1)).layers] == [6]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(dim=0), "lstm.dim is 0; it must be at least 1."),
        (dict(weight_drop=1.0), "lstm.weight_drop is 1.0; it must be from 0 to below 1."),
        (dict(dropout_input=float("nan")), "lstm.dropout_input is nan"),
        (dict(activation_reg=-1), "lstm.activation_reg is -1; it must be at least 0 and finite."),
    ],
)
def test_bad_settings(options, sentence):
    with pytest.raises(UserError, match=sentence):
        settings(**options)
    with pytest.raises(UserError, match="no preset 'large'; there are ulmfit, "):
        AWDLSTMConfig.preset("large")
    with pytest.raises(UserError, match="multiplied by -1"):
        settings().scaled(-1)
