import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from glomo.errors import UserError
from glomo.nn import BandGraph
from glomo.nn.decoding import greedy
from glomo.nn.transformer import LanguageModel, Transformer
from glomo.nn.transformer_config import TransformerConfig
from glomo.nn.transformer_layers import Attention, Context, Layer, Stack

SOURCE_LENGTHS, LENGTHS = torch.tensor([7, 4, 2]), torch.tensor([6, 6, 3])
KINDS = [
    dict(),
    dict(norm="pre"),
    dict(positions="learned"),
    dict(positions="relative"),
    dict(norm="pre", positions="relative"),
]


def settings(**options):
    options = {"vocab_size": 30, "dropout": 0.0, "max_length": 24, "max_distance": 4, **options}
    return TransformerConfig.preset("tiny", **options)


def make(kind=Transformer, **options):
    """A model in fp64 whose parameters all count, and whose logits differ enough to decode something."""
    torch.manual_seed(2)
    model = kind(settings(**options)).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def sequences(lengths, generator=None):
    length = int(lengths.max())
    tokens = torch.randint(2, 30, (len(lengths), length), generator=generator)
    return tokens * (torch.arange(length) < lengths[:, None])


def packed_as_pytorch(weight, heads):
    """Rows of q, k and v head by head, in PyTorch's order: all of q, all of k, all of v."""
    return (
        weight.unflatten(0, (heads, -1)).unflatten(1, (-1, weight.size(0) // 3 // heads)).transpose(0, 1).flatten(0, 2)
    )


def load_attention(theirs, ours):
    with torch.no_grad():
        if ours.query is None:
            theirs.in_proj_weight.copy_(packed_as_pytorch(ours.packed.weight, ours.heads))
            theirs.in_proj_bias.copy_(packed_as_pytorch(ours.packed.bias[:, None], ours.heads)[:, 0])
        else:
            pair = [ours.packed.weight, ours.packed.bias[:, None]]
            pair = [p.unflatten(0, (ours.heads, 2, -1)).transpose(0, 1).flatten(0, 2) for p in pair]
            theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, pair[0]]))
            theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, pair[1][:, 0]]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("over_memory", [False, True])
def test_a_layer_is_pytorchs(norm, over_memory):
    """nn.TransformerEncoderLayer and nn.TransformerDecoderLayer with the same weights, value and gradient."""
    config = settings(norm=norm)
    torch.manual_seed(1)
    ours = Layer(config, "softmax", over_memory).double()
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    kind = nn.TransformerDecoderLayer if over_memory else nn.TransformerEncoderLayer
    theirs = kind(config.dim, config.heads, config.ff, 0.0, norm_first=norm == "pre", batch_first=True).double()
    load_attention(theirs.self_attn, ours.attention)
    if over_memory:
        load_attention(theirs.multihead_attn, ours.over_memory)
    for number, each in enumerate(ours.norms):
        getattr(theirs, f"norm{number + 1}").load_state_dict(each.state_dict())
    theirs.linear1.load_state_dict(ours.inner.state_dict())
    theirs.linear2.load_state_dict(ours.outer.state_dict())

    x, memory = (torch.randn(3, n, config.dim, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    allowed = torch.arange(7) < SOURCE_LENGTHS[:, None]
    if over_memory:
        readable = torch.arange(5) < torch.tensor([[5], [3], [1]])
        out = ours(x, Context(causal=True), Context(readable[:, None, None], memory=memory))
        causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
        expected = theirs(x, memory, tgt_mask=causal, memory_key_padding_mask=~readable)
        inputs = [x, memory]
    else:
        out = ours(x, Context(allowed[:, None, None]))
        expected = theirs(x, src_key_padding_mask=~allowed)
        inputs = [x]
    torch.testing.assert_close(out, expected)
    for mine, other in zip(*(torch.autograd.grad(o.square().sum(), inputs) for o in (out, expected)), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("options", KINDS)
def test_the_loss_is_of_each_sequence_alone(options):
    """Batch mates and padding change nothing, and a unit is predicted from earlier ones only."""
    model = make(**options).eval()
    source, target = sequences(SOURCE_LENGTHS), sequences(LENGTHS)
    total = 0.0
    for row in range(3):
        one = source[row : row + 1, : SOURCE_LENGTHS[row]], SOURCE_LENGTHS[row : row + 1]
        memory = model.encode(*one)
        read = torch.tensor([[model.end, *target[row, : LENGTHS[row]].tolist()]])
        predicted = [*target[row, : LENGTHS[row]].tolist(), model.end]
        for t, unit in enumerate(predicted):  # nothing later is there to be read
            hidden = model.decoder(model.embed(read[:, : t + 1]), Context(causal=True), memory)
            total -= model.logits(hidden[0, -1]).log_softmax(-1)[unit]
    expected = total / int((LENGTHS + 1).sum())
    torch.testing.assert_close(model(source, SOURCE_LENGTHS, target, LENGTHS), expected)


def test_smoothing_is_of_training_only_and_gives_padding_nothing():
    model = make(smoothing=0.3)
    source, target = sequences(SOURCE_LENGTHS), sequences(LENGTHS)
    loss = model(source, SOURCE_LENGTHS, target, LENGTHS)
    inputs, outputs = model.shifted(target, LENGTHS)
    hidden = model.decoder(model.embed(inputs), Context(causal=True), model.encode(source, SOURCE_LENGTHS))
    p = (hidden @ model.embedding.weight.T)[..., 1:].log_softmax(-1)  # without padding
    kept = outputs > 0
    wanted = 0.7 * F.one_hot(outputs[kept] - 1, p.size(-1)) + 0.3 / p.size(-1)
    torch.testing.assert_close(loss, -(wanted * p[kept]).sum(-1).mean())
    assert model.eval()(source, SOURCE_LENGTHS, target, LENGTHS) < loss


@pytest.mark.parametrize("options", [*KINDS, dict(decoder_attention=("relu2", "softmax"))])
@pytest.mark.parametrize("kind", [Transformer, LanguageModel])
def test_cached_decoding_is_decoding(kind, options):
    """The log-probabilities of every step are those of the whole sequence at once."""
    model = make(kind, **options).eval()
    source, target = sequences(SOURCE_LENGTHS), torch.randint(2, 30, (3, 6))
    start = (source, SOURCE_LENGTHS) if kind is Transformer else ()
    state, memory = model.start(*start), (model.encode(*start),) if start else ()
    inputs, _ = model.shifted(target, torch.full((3,), 6))
    hidden = model.decoder(model.embed(inputs), Context(causal=True), *memory)
    expected = model.logits(hidden).float().log_softmax(-1)
    rows = torch.arange(3)
    for t in range(7):
        torch.testing.assert_close(state.step(inputs[rows, t]), expected[rows, t])
        rows = rows[torch.tensor([2, 0, 0]) if t == 3 else torch.arange(3)]
        if t == 3:
            state.select(torch.tensor([2, 0, 0]))


def test_learns_to_reverse():
    """A few hundred steps of a tiny model on a task that takes attention to positions."""
    torch.manual_seed(0)
    model = Transformer(settings(vocab_size=12, smoothing=0.0))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(3)
    for _ in range(250):
        source = torch.randint(2, 12, (32, 5), generator=generator)
        lengths = torch.full((32,), 5)
        loss = model(source, lengths, source.flip(1), lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source = torch.randint(2, 12, (20, 5), generator=generator)
    found = greedy(model.eval().start(source, torch.full((20,), 5)), 20, model.end, 8)
    right = sum(out == row.flip(0).tolist() for out, row in zip(found, source, strict=True))
    assert right >= 15


def test_a_graph_feeds_the_encoder():
    graph = BandGraph(2)
    torch.manual_seed(0)
    model = Transformer(settings(encoder_attention=("graph", "softmax")), graph).eval()
    source, target = sequences(SOURCE_LENGTHS), sequences(LENGTHS)
    graphs = graph.queries_keys(source, SOURCE_LENGTHS)
    loss = model(source, SOURCE_LENGTHS, target, LENGTHS, graphs)
    loss.backward()
    attention = model.encoder.layers[0].attention
    assert attention.out.weight.grad.abs().max() > 0
    # by hand: each direction's band as a matrix over one sequence
    x = torch.randn(1, 7, 64)
    mixed = attention.transfer(x, SOURCE_LENGTHS[:1], graph.queries_keys(source[:1], SOURCE_LENGTHS[:1]))
    torch.testing.assert_close(
        attention(x, Context(lengths=SOURCE_LENGTHS[:1], graphs=graph.queries_keys(source[:1], SOURCE_LENGTHS[:1]))),
        F.linear(mixed, attention.out.weight, attention.out.bias),
    )
    with pytest.raises(UserError, match="must be given one"):
        Transformer(settings(encoder_attention=("graph",)))


def test_relu2_layers_read_with_a_graph():
    torch.manual_seed(0)
    attention = Attention(settings(), "relu2").double()
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    q, k, v = attention.packed(x).view(2, 5, 2, 96).transpose(1, 2).split(32, -1)
    r = (q @ k.mT / 32**0.5 + 1).tril().relu().tril()
    graph = r**2 / ((r**2).sum(-1, keepdim=True) + 1e-6)
    expected = attention.out((graph @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, Context(causal=True)), expected)


def test_weights_are_shared_and_scaled():
    model = Transformer(settings(vocab_size=5000))
    assert sum(p.numel() for p in model.embedding.parameters()) == 5001 * 64
    assert not any(name.startswith("output") for name, _ in model.named_parameters())
    units = model.embed(torch.arange(1, 5000))
    assert abs(float(units.detach().std()) - 1) < 0.02
    assert (model.embed(torch.zeros(1, 1, dtype=torch.int64)) == 0).all()


def test_settings_survive_json_and_base_is_the_published_size():
    config = settings(encoder_attention=("relu2", "softmax"))
    assert TransformerConfig.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        base = Transformer(TransformerConfig.preset("base"))
        big = Transformer(TransformerConfig.preset("big"))
    assert abs(sum(p.numel() for p in base.parameters()) / 63e6 - 1) < 0.01  # 65M with a vocabulary of 40,000
    assert abs(sum(p.numel() for p in big.parameters()) / 214e6 - 1) < 0.01


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(heads=5), "model.dim is 64; it must be a multiple of model.heads, which is 5"),
        (dict(norm="middle"), "model.norm is 'middle'"),
        (dict(layers=0), "model.layers is 0"),
        (dict(dropout=1.0), "model.dropout is 1.0"),
        (dict(encoder_attention=("softmax",) * 3), "each of the 2 layers"),
        (dict(decoder_attention=("graph",)), "model.decoder_attention is graph"),
        (dict(dim=63, heads=1), "even"),
    ],
)
def test_bad_settings(options, sentence):
    with pytest.raises(UserError, match=sentence):
        settings(**options)
    with pytest.raises(UserError, match="no preset 'large'"):
        TransformerConfig.preset("large")


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "relative"])
def test_a_sequence_beyond_the_longest(positions):
    model = make(LanguageModel, positions=positions)
    with pytest.raises(ValueError, match="25 units, its end included; the model takes 24"):
        model(torch.full((1, 25), 3), torch.full((1, 25), 3))
    stack = Stack(model.config, ["softmax"])
    assert copy.deepcopy(stack).positions.max_length == 24
