import pytest
import torch

from glomo.errors import UserError
from glomo.nn import FrozenGraph, GatedFusion, GLoMoConfig, GraphPredictor, GraphTransfer, random_graph

LENGTHS = torch.tensor([6, 3, 1])


class Words:
    def __len__(self):
        return 13


def make(weights="global", switches=None, **options):
    """A graph, its input and a transfer module with weights that differ everywhere."""
    torch.manual_seed(2)
    config = GLoMoConfig.preset(
        "released", vocab_size=13, dim=8, layers=3, heads=2, head_dim=4, conv_blocks=1, **(switches or {})
    )
    graph = FrozenGraph(GraphPredictor(config).double(), Words())
    transfer = GraphTransfer(graph, 5, weights=weights, **options).double()
    for parameter in transfer.parameters():
        parameter.data += torch.randn_like(parameter)
    tokens = torch.randint(2, 13, (3, 6)) * (torch.arange(6) < LENGTHS[:, None])
    return graph, transfer, tokens, torch.randn(3, 6, 5, dtype=torch.float64)


def oracle(graph, transfer, tokens, features, *, per_target, products=True, last=False):
    """[mixtures of forward, mixtures of backward] of one sequence, from graphs as matrices in the order of the text."""
    mixed = []
    for direction in range(2):
        a = graph.graph_predictor.graphs(tokens[None], torch.tensor([len(tokens)]))[0, direction]
        layers = list(a.split(2))
        if last:
            layers = layers[-1:]
        chain, candidates, running = [], list(torch.cat(layers)), layers[0]
        for layer in layers[1:]:
            running = torch.stack([layer[h] @ running[h] for h in range(2)])
            chain.extend(running)
        candidates += chain if products and not last else []
        for m in range(transfer.num_mixtures):
            out = torch.zeros_like(features)
            for t in range(len(tokens)):
                if per_target:
                    linear = transfer.target_logits[direction]
                    logits = (linear.weight @ features[t] + linear.bias).view(transfer.num_mixtures, -1)[m]
                else:
                    logits = transfer.logits[direction, m]
                assert len(logits) == len(candidates)
                weight = logits.exp() / logits.exp().sum()
                out[t] = sum(w * (c[t] @ features) for w, c in zip(weight, candidates, strict=True))
            mixed.append(transfer.scales[direction, m] * out)
    return torch.cat(mixed, -1)


@pytest.mark.parametrize(
    "switches",
    [{}, {"activation": "softmax"}, {"distance_bias": 2}, {"masked_sources": (4, 5)}, {"equal_bias": True}],
    ids=str,
)
@pytest.mark.parametrize("weights", ["global", "target"])
def test_mixtures_of_graphs_and_matrix_products(weights, switches):
    graph, transfer, tokens, features = make(weights, switches, fusion="none")
    found = transfer(features, LENGTHS, graph.queries_keys(tokens, LENGTHS))
    assert found.shape == (3, 6, transfer.out_dim)
    for row, size in enumerate(LENGTHS.tolist()):
        expected = oracle(graph, transfer, tokens[row, :size], features[row, :size], per_target=weights == "target")
        torch.testing.assert_close(found[row, :size], expected, rtol=1e-9, atol=1e-12)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("options", "how", "count"),
    [({}, {}, 3 * 2 + 2 * 2), ({"chains": False}, {"products": False}, 3 * 2), ({"layers": "last"}, {"last": True}, 2)],
    ids=str,
)
def test_numbers_of_logits_and_switches(options, how, count):
    graph, transfer, tokens, features = make(fusion="none", num_mixtures=3, **options)
    assert transfer.logits.shape == (2, 3, count)
    found = transfer(features, LENGTHS, graph.queries_keys(tokens, LENGTHS))
    expected = oracle(graph, transfer, tokens[0], features[0], per_target=False, **how)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-12)


def test_a_fresh_module_mixes_everything_evenly_with_scale_one():
    graph, _, _, _ = make()
    transfer = GraphTransfer(graph, 5)
    torch.testing.assert_close(transfer.mixture_weights(0, torch.zeros(1, 1, 5)), torch.full((2, 10), 0.1))
    assert torch.all(transfer.scales == 1)


def test_fusions():
    graph, transfer, tokens, features = make(fusion="none")
    inputs = graph.queries_keys(tokens, LENGTHS)
    mixed = transfer(features, LENGTHS, inputs)
    together = torch.cat([features, mixed], -1)

    concat = GraphTransfer(graph, 5, fusion="concat").double()
    concat.load_state_dict(transfer.state_dict())
    torch.testing.assert_close(concat(features, LENGTHS, inputs), together)
    assert concat.out_dim == together.shape[-1] == 25

    gated = GraphTransfer(graph, 5, fusion="gate", out_dim=7).double()
    gated.load_state_dict(transfer.state_dict(), strict=False)
    w, b = gated.gate.linear.weight, gated.gate.linear.bias
    expected = (together @ w[:7].T + b[:7]) * torch.sigmoid(together @ w[7:].T + b[7:])
    torch.testing.assert_close(gated(features, LENGTHS, inputs), expected)


def test_padding_of_features_and_tokens_changes_nothing():
    graph, transfer, tokens, features = make("target")
    out = transfer(features, LENGTHS, graph.queries_keys(tokens, LENGTHS))
    noise = torch.arange(6) >= LENGTHS[:, None]
    tokens, features = tokens + 7 * noise, features + 1000 * noise[..., None]
    other = transfer(features, LENGTHS, graph.queries_keys(tokens, LENGTHS))
    for row, size in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(other[row, :size], out[row, :size], rtol=1e-10, atol=1e-12)


def test_float_and_bfloat16_features_on_a_graph_of_another_dtype():
    graph, transfer, tokens, features = make()
    expected = transfer(features, LENGTHS, graph.queries_keys(tokens, LENGTHS))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = transfer.to(dtype)(features.to(dtype), LENGTHS, graph.queries_keys(tokens, LENGTHS))
        assert found.dtype == dtype
        torch.testing.assert_close(found[0].double(), expected[0], rtol=tolerance, atol=5 * tolerance)
        transfer.double()


def test_gradcheck_of_everything_that_trains():
    graph, transfer, tokens, features = make("target", num_mixtures=1)
    inputs = graph.queries_keys(tokens, LENGTHS)
    names, values = zip(*transfer.named_parameters(), strict=True)

    def run(features, *parameters):
        return torch.func.functional_call(
            transfer, dict(zip(names, parameters, strict=True)), (features, LENGTHS, inputs)
        )

    values = [v.detach().requires_grad_() for v in values]
    assert torch.autograd.gradcheck(run, (features[:, :, :].requires_grad_(), *values), fast_mode=True)


def test_one_call_of_the_fused_op_per_direction(monkeypatch):
    import glomo.nn.graphs as module

    graph, transfer, tokens, features = make("target", num_mixtures=4)
    calls = []
    real = module.relu2_graph_mix

    def watched(*args, **kwargs):
        calls.append(len(args[3]))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "relu2_graph_mix", watched)
    transfer(features, LENGTHS, graph.queries_keys(tokens, LENGTHS))
    assert calls == [4, 4]


def test_learned_and_random_graphs_give_different_features():
    graph, transfer, tokens, features = make()
    control = random_graph(graph.config, Words(), seed=9).double()
    outputs = [transfer(features, LENGTHS, g.queries_keys(tokens, LENGTHS)) for g in (graph, control)]
    assert not torch.allclose(*outputs)


def test_gated_fusion_is_the_papers_formula():
    fusion = GatedFusion(3, 2)
    x = torch.randn(4, 3)
    first, second = (x @ fusion.linear.weight.T + fusion.linear.bias).split(2, -1)
    torch.testing.assert_close(fusion(x), first * torch.sigmoid(second))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "none"}, "weights is 'none'.*global, target"),
        ({"layers": "first"}, "layers is 'first'"),
        ({"fusion": "sum"}, "fusion is 'sum'"),
        ({"num_mixtures": 0}, "num_mixtures is 0"),
        ({"fusion": "concat", "out_dim": 3}, "out_dim.*concat"),
    ],
    ids=str,
)
def test_bad_options_are_sentences(options, words):
    graph, *_ = make()
    with pytest.raises(UserError, match=words):
        GraphTransfer(graph, 5, **options)


def test_inputs_of_another_graph_are_named():
    _, transfer, _, features = make()
    with pytest.raises(ValueError, match=r"0 directions.*2"):
        transfer(features, LENGTHS, ())
