"""The whole of GLoMo against a slow oracle, and what must never reach a prediction."""

import pytest
import torch

SEQUENCES = ([3, 7, 2, 3, 4, 7, 3], [5, 2, 5], [8, 1, 1, 6])

SWITCHES = [
    {},
    {"sparsity": "threshold"},
    {"scaled": True, "norm": "none"},
    {"update": "gru_product"},
    {"update": "linear", "norm_aggregate": True},
    {"activation": "softmax"},
    {"activation": "softmax", "distance_bias": 2, "masked_sources": (2, 1)},
    {"activation": "uniform"},
    {"activation": "none"},
    {"activation": "rnn", "layers": 2},
    {"scaled_embedding": True},
    {"keys_before": True, "tied_start": True, "start_gain": 2.0, "initial_bias": -0.5},
    {"distance_bias": 3, "distance_start": "slopes"},
    {"coupled": True, "distance_bias": 3},
    {"coupled": True, "sparsity": "threshold", "layers": 3},
    {"equal_bias": True},
    {"equal_bias": True, "distance_bias": 2, "sparsity": "threshold", "value_projection": True},
    {"equal_bias": True, "coupled": True, "layers": 3},
    {"equal_bias": True, "activation": "softmax"},
    {"distance_bias": 2},
    {"distance_bias": 2, "sparsity": "threshold", "scaled": True},
    {"masked_sources": (2, 1)},
    {"horizon": 1, "decoder_layers": 1},
    {"horizon": 9},
    {"objective": "sentence"},
    {"layers": 1, "heads": 1, "kernel_size": 1, "conv_blocks": 0},
]


def name(switches):
    return "-".join(f"{k}={v}" for k, v in switches.items()) or "plain"


@pytest.mark.parametrize("switches", SWITCHES, ids=name)
def test_loss_is_the_oracles(oracle, switches):
    model = oracle.small("paper", **switches).eval()
    expected = oracle.loss(model, *SEQUENCES)
    assert model(*oracle.batch(*SEQUENCES)).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"sparsity": "threshold", "update": "gru_product"},
        {"equal_bias": True, "distance_bias": 2, "update": "linear", "value_projection": True},
        {"equal_bias": True, "coupled": True, "sparsity": "bias", "layers": 2},
    ],
    ids=name,
)
def test_gradient_is_the_oracles(oracle, switches):
    model = oracle.small("released", positions=0, **switches)
    names, parameters = zip(*model.named_parameters(), strict=True)
    # the oracle's look-ups are not scaled by frequency
    model.graph_predictor.embedding.scale_grad_by_freq = False
    expected = torch.autograd.grad(oracle.loss(model, *SEQUENCES), parameters)
    found = torch.autograd.grad(model(*oracle.batch(*SEQUENCES)), parameters)
    for parameter, e, f in zip(names, expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-11, msg=parameter)


def test_every_switch_changes_the_loss(oracle):
    tokens, lengths = oracle.batch(*SEQUENCES)
    losses = {name(s): oracle.small("paper", **s).eval()(tokens, lengths).item() for s in SWITCHES}
    assert len({round(loss, 9) for loss in losses.values()}) == len(losses)


PRESETS = [("paper", {}), ("released", {}), ("paper", {"activation": "softmax"}), ("paper", {"coupled": True})]
PRESETS += [("released", {"distance_bias": 2, "norm_aggregate": True, "masked_sources": (4,)})]
PRESETS += [("paper", {"equal_bias": True}), ("paper", {"equal_bias": True, "activation": "softmax"})]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("preset", "switches"), PRESETS, ids=str)
def test_no_leak_of_values(oracle, preset, switches, training):
    """Units t+1.. change: nothing that predicts unit t+1 does. Backward, the same for units ..t-1."""
    model = oracle.small(preset, **switches).train(training)
    ids = [3, 7, 2, 9, 4, 11, 5, 6]
    for cut in range(1, len(ids)):
        after = ids[:cut] + [(i + 5) % 13 for i in ids[cut:]]
        before = [(i + 5) % 13 for i in ids[:cut]] + ids[cut:]
        # in a batch with others, so that statistics over the batch would show as well
        base = model.features(*oracle.batch(ids, ids[:3]))
        forward, _ = model.features(*oracle.batch(after, ids[:3]))
        _, backward = model.features(*oracle.batch(before, ids[:3]))
        assert torch.equal(forward[0, :cut], base[0][0, :cut])
        assert torch.equal(backward[0, cut:], base[1][0, cut:])
        assert not torch.equal(forward[0, cut:], base[0][0, cut:])
        assert torch.equal(forward[1], base[0][1])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("preset", "switches"), [*PRESETS, ("paper", {"objective": "sentence"})], ids=str)
def test_no_leak_of_gradients(oracle, preset, switches, training):
    """The gradient of f_t with respect to the embedded units after it is zero, and of those up to it is not."""
    model = oracle.small(preset, **switches).train(training)
    predictor = model.graph_predictor
    tokens, _ = oracle.batch([3, 7, 2, 9, 4, 11])
    for index in range(2):
        x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
        f_module = predictor.directions[index].features if switches.get("coupled") else model.feature_predictors[index]
        features = f_module(x, predictor.direction(index, tokens, x))
        for t in range(6):
            (gradient,) = torch.autograd.grad(features[0, t].sum(), x, retain_graph=True)
            assert torch.all(gradient[0, t + 1 :] == 0)
            assert torch.all(gradient[0, t].abs().sum() > 0)


def test_sentence_objective_predicts_only_units_after_its_half(oracle):
    """The vector that starts the decoder is the mean over the first half, and it does not move with the rest."""
    model = oracle.small("paper", objective="sentence")
    starts = []

    def keep(start, *args):
        starts.append(start)
        return start.sum()

    for decoder in model.decoders:
        decoder.forward = keep
    for ids in ([3, 7, 2, 9, 4, 11, 5], [3, 7, 2, 5, 6, 1, 8]):
        model(*oracle.batch(ids))
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[1], starts[3])


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_padding_changes_nothing(oracle, preset):
    """A batch of different lengths equals its sequences alone; what stands in the padding does not matter."""
    model = oracle.small(preset).eval()
    tokens, lengths = oracle.batch(*SEQUENCES)
    together = model.features(tokens, lengths)
    for row, ids in enumerate(SEQUENCES):
        alone = model.features(*oracle.batch(ids))
        for direction in range(2):
            torch.testing.assert_close(together[direction][row, : len(ids)], alone[direction][0], rtol=0, atol=1e-14)
    loss = model(tokens, lengths)
    tokens[1, 3:] = 12
    assert torch.equal(model(tokens, lengths), loss)
    wide = torch.cat([tokens, torch.full((3, 4), 9)], 1)
    torch.testing.assert_close(model(wide, lengths), loss, rtol=1e-13, atol=0)


def test_padding_takes_no_gradient(oracle):
    model = oracle.small("paper")
    weight = model.graph_predictor.embedding.weight
    tokens, lengths = oracle.batch(*SEQUENCES)
    gradients = []
    for filler in (0, 12):
        padded = torch.where(torch.arange(7) < lengths[:, None], tokens, filler)
        gradients.append(torch.autograd.grad(model(padded, lengths), weight)[0])
    assert torch.equal(*gradients)


def test_backward_model_equals_forward_model_on_the_reversed_text(oracle):
    model = oracle.small("paper").eval()
    directions = model.graph_predictor.directions
    for pair in (directions, model.feature_predictors, model.decoders):
        pair[1].load_state_dict(pair[0].state_dict())
    forward, backward = model.features(*oracle.batch(*SEQUENCES))
    turned, _ = model.features(*oracle.batch(*(ids[::-1] for ids in SEQUENCES)))
    for row, ids in enumerate(SEQUENCES):
        torch.testing.assert_close(backward[row, : len(ids)], turned[row, : len(ids)].flip(0), rtol=0, atol=1e-14)
    assert not torch.allclose(forward[0], backward[0])


def test_sampled_positions_come_from_the_generator_and_only_in_training(oracle):
    model = oracle.small("released", positions=2)
    tokens, lengths = oracle.batch(*SEQUENCES)

    def loss(seed):
        return model(tokens, lengths, torch.Generator().manual_seed(seed)).item()

    assert loss(1) == loss(1)
    assert len({loss(seed) for seed in range(6)}) > 1
    assert len({model.eval()(tokens, lengths).item() for _ in range(3)}) == 1
    everything = oracle.loss(model, *SEQUENCES).item()
    assert model(tokens, lengths).item() == pytest.approx(everything, rel=1e-10)


@pytest.mark.parametrize(
    ("more", "of_row"),
    [
        ({"rescue_weight": 2.0, "rescue_margin": 3.0}, lambda row: max(0.0, 3.0 - row.max().item()) ** 2),
        ({"l1_weight": 2.0}, lambda row: row.clamp(min=0).sum().item()),
    ],
    ids=["rescue", "l1"],
)
def test_terms_on_the_graph_are_added_in_training_only(oracle, more, of_row):
    plain, with_term = oracle.small("paper"), oracle.small("paper", **more)
    tokens, lengths = oracle.batch(*SEQUENCES)
    difference = with_term(tokens, lengths) - plain(tokens, lengths)
    means = [0.0, 0.0]
    for direction, graphs in enumerate(plain.graph_predictor(tokens, lengths)):
        scores = graphs.query @ graphs.key.transpose(-1, -2) + graphs.bias
        rows = [
            of_row(scores[row, n, t, :t])
            for row, ids in enumerate(SEQUENCES)
            for n in range(4)
            for t in range(1, len(ids))
        ]
        means[direction] = sum(rows) / len(rows)
    assert difference.item() == pytest.approx(2.0 * sum(means) / 2, rel=1e-9)
    assert difference > 0
    assert torch.equal(with_term.eval()(tokens, lengths), plain.eval()(tokens, lengths))


@pytest.mark.parametrize("ids", [[4], []], ids=["one unit", "empty"])
@pytest.mark.parametrize("objective", ["unit", "sentence"])
def test_nothing_to_predict_gives_zero_loss_and_gradient(oracle, ids, objective):
    model = oracle.small("released", objective=objective)
    tokens = torch.tensor([ids + [0] * 2])
    loss = model(tokens, torch.tensor([len(ids)]))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or torch.all(p.grad == 0) for p in model.parameters())


def test_state_dict_has_no_tensor_twice(oracle):
    for switches in ({}, {"coupled": True}):
        values = oracle.small("paper", **switches).state_dict().values()
        assert len({v.data_ptr() for v in values}) == len(values)


def test_it_learns(oracle):
    """A fixed sequence, learned by heart: the loss falls well below that of guessing evenly (ln 13 = 2.56)."""
    model = oracle.small("released", dim=16, heads=2).float()
    tokens, lengths = oracle.batch(*SEQUENCES)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens, lengths, generator).backward()
        optimizer.step()
    assert model.eval()(tokens, lengths) < 1.0


def test_bfloat16_autocast_runs_forward_and_backward(oracle):
    for switches in ({}, {"distance_bias": 2}, {"activation": "softmax"}, {"activation": "uniform"}):
        model = oracle.small("released", **switches).float()
        tokens, lengths = oracle.batch(*SEQUENCES)
        with torch.autocast("cpu", torch.bfloat16):
            model.eval()
            loss = model(tokens, lengths)
        loss.backward()
        assert loss.dtype == torch.float32
        expected = oracle.loss(model.double(), *SEQUENCES).item()
        assert loss.item() == pytest.approx(expected, rel=0.03)
