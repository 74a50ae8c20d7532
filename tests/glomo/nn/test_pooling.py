import pytest
import torch
from torch import nn

from glomo.nn.awd_lstm import AWDLSTM, AWDLSTMConfig
from glomo.nn.pooling import ConcatPooling, PoolingHead, pooled_documents

LENGTHS = torch.tensor([5, 1, 13, 12, 4, 13])


class Reader:
    """An encoder over which gradients may go back through the state; it counts what it has read."""

    def __init__(self, detached=False):
        torch.manual_seed(1)
        self.embedding = nn.Embedding(20, 3).double()
        self.lstm = nn.LSTM(3, 4, batch_first=True).double()
        self.detached = detached
        self.read, self.with_gradient = [], 0

    def __call__(self, units, state):
        self.read.append(units)
        self.with_gradient += torch.is_grad_enabled()
        out, (h, c) = self.lstm(self.embedding(units), None if state is None else state[0])
        return out, [(h.detach(), c.detach()) if self.detached else (h, c)]

    @property
    def parameters(self):
        return [self.embedding.weight, *self.lstm.parameters()]


def documents(lengths=LENGTHS):
    torch.manual_seed(2)
    units = torch.randint(1, 20, (len(lengths), int(lengths.max())))
    return torch.where(torch.arange(units.size(1)) < lengths[:, None], units, 19)  # no zeros behind the lengths


def by_hand(reader, units, chunk, window):
    """Last, maximum and mean of one document (n,), read alone; older chunks are constants."""
    parts = list(units.split(chunk))
    state, features = None, []
    for number, part in enumerate(parts):
        with torch.set_grad_enabled(number >= len(parts) - window):
            out, state = reader(part[None], state)
        features += list(out[0])
    greatest, total = features[0], 0.0
    for h in features:
        greatest = torch.where(h > greatest, h, greatest)
        total = total + h
    return torch.cat([features[-1], greatest, total / len(features)])


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 13, 50])
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_is_each_document_read_alone(chunk, detached, window):
    """Values whatever the chunk, and the gradient of the last `window` chunks, also through the state if it is kept."""
    reader, units = Reader(detached), documents()
    found = pooled_documents(reader, units, LENGTHS, chunk, window)
    expected = torch.stack([by_hand(reader, row[:n], chunk, window) for row, n in zip(units, LENGTHS, strict=True)])
    torch.testing.assert_close(found, expected)
    whole = torch.stack([by_hand(reader, row[:n], 50, 1) for row, n in zip(units, LENGTHS, strict=True)])
    torch.testing.assert_close(found, whole)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((x * weights).sum(), reader.parameters) for x in (found, expected)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)
    if window == 100 and not detached:
        for mine, other in zip(
            gradients[0], torch.autograd.grad((whole * weights).sum(), reader.parameters), strict=True
        ):
            torch.testing.assert_close(mine, other)


def test_every_unit_is_read_once_and_in_order():
    reader, units = Reader(), documents()
    seen = []
    pooled_documents(reader, units, LENGTHS, 4, 2, seen.append)
    assert [chunk.units.tolist() for chunk in seen] == [units.tolist() for units in reader.read[-2:]]
    assert [len(read) for read in reader.read] == [2, 3, 4, 6]
    assert sum(int((read != 0).sum()) for read in reader.read) == int(LENGTHS.sum())
    for chunk in seen:
        assert chunk.features.requires_grad
        for row, start, read, real in zip(chunk.rows, chunk.starts, chunk.units, chunk.real, strict=True):
            n = int(real.sum())
            assert read[:n].tolist() == units[row, start : start + n].tolist()
            assert (read[n:] == 0).all()
    ended = {int(row): int(start + real.sum()) for row, start, real in zip(*seen[-1][:2], seen[-1].real, strict=True)}
    assert ended == dict(enumerate(LENGTHS.tolist()))


@pytest.mark.parametrize("row", [0, 1, 4])
def test_a_documents_gradient_does_not_depend_on_its_batch_mates(row):
    """A long one beside it must not take its steps with gradients away."""
    n, reader = int(LENGTHS[row]), Reader()
    short = documents()[row : row + 1, :n]
    long = torch.randint(1, 20, (1, 40))
    both = torch.cat([long, nn.functional.pad(short, (0, 40 - n))])
    weights = torch.randn(12, dtype=torch.float64)
    together = pooled_documents(reader, both, torch.tensor([40, n]), 2, 2)[1]
    alone = pooled_documents(reader, short, torch.tensor([n]), 2, 2)[0]
    gradients = [torch.autograd.grad(x @ weights, reader.parameters) for x in (together, alone)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)
    assert gradients[0][0].abs().max() > 0


def test_memory_does_not_grow_with_length():
    """Neither the steps with gradients nor what autograd keeps for them."""
    kept = {}
    for n in (20, 200):
        reader, sizes = Reader(), []

        def keep(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            pooled_documents(reader, torch.randint(1, 20, (2, n)), torch.tensor([n, 7]), 5, 3)
        assert reader.with_gradient == 3
        assert len(reader.read) == n // 5
        kept[n] = sum(sizes)
    assert kept[20] == kept[200]


def test_without_gradients_it_is_the_same():
    reader, units = Reader(), documents()
    with torch.no_grad():
        found = pooled_documents(reader, units, LENGTHS, 4, 2)
    assert not found.requires_grad
    torch.testing.assert_close(found, pooled_documents(reader, units, LENGTHS, 4, 2).detach())
    assert reader.with_gradient == 2


def test_an_encoder_without_a_state():
    """Chunks are read each alone then."""
    table = torch.randn(20, 3)
    states = []

    def encode(units, state):
        states.append(state)
        return table[units], None

    found = pooled_documents(encode, documents(), LENGTHS, 5, 1)
    assert states == [None] * 3
    for row, (units, n) in enumerate(zip(documents(), LENGTHS, strict=True)):
        features = table[units[:n]]
        torch.testing.assert_close(found[row], torch.cat([features[-1], features.amax(0), features.mean(0)]))


def test_the_lstm_of_a_language_model_reads_documents():
    torch.manual_seed(0)
    model = AWDLSTM(AWDLSTMConfig.preset("tiny", vocab_size=20)).eval()

    def encode(units, state):
        encoded = model(units, state)
        return encoded.dropped, encoded.state

    units = documents()
    found = pooled_documents(encode, units, LENGTHS, 4, 2)
    assert found.shape == (6, 96)
    for row, n in enumerate(LENGTHS):
        features = model(units[row : row + 1, :n]).raw[0]
        torch.testing.assert_close(found[row], torch.cat([features[-1], features.amax(0), features.mean(0)]))
    model.train()
    pooled_documents(encode, units, LENGTHS, 4, 2).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_adds_up_in_fp32():
    features = torch.full((1, 3000, 2), 1.0).bfloat16()
    pooled = ConcatPooling.of(features, torch.ones(1, 3000, dtype=torch.bool))
    assert pooled.before(pooled).result().tolist() == [[1.0] * 6]


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        ([3, 0], "the lengths are from 0 to 3; from 1 to 4"),
        ([5, 1], "the lengths are from 1 to 5; from 1 to 4, the width of the units, are needed"),
        ([], "the lengths are of no document"),
    ],
)
def test_bad_lengths(lengths, sentence):
    units = torch.ones(len(lengths), 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=sentence):
        pooled_documents(Reader(), units, torch.tensor(lengths, dtype=torch.int64), 2, 2)
    with pytest.raises(ValueError, match="chunk is 0 and window 2; at least 1"):
        pooled_documents(Reader(), documents(), LENGTHS, 0, 2)


def test_the_head_is_two_blocks():
    torch.manual_seed(0)
    head, x = PoolingHead(6, 3, hidden=4, dropouts=(0.0, 0.0)).double(), torch.randn(5, 6, dtype=torch.float64)
    first, second = (module for module in head if isinstance(module, nn.Linear))

    def normed(x):
        return (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)

    expected = normed((normed(x) @ first.weight.T + first.bias).clamp(min=0)) @ second.weight.T + second.bias
    torch.testing.assert_close(head(x), expected)
    drops = [module.p for module in PoolingHead(6, 3) if isinstance(module, nn.Dropout)]
    assert drops == [0.4, 0.1]
    assert PoolingHead(6, 3)[2].out_features == 50


def test_the_head_takes_a_batch_of_one():
    torch.manual_seed(0)
    head, x = PoolingHead(6, 3, dropouts=(0.0, 0.0)), torch.randn(5, 6)
    for _ in range(3):
        head(x)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    one = head(x[:1])
    one.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    torch.testing.assert_close(one, head.eval()(x[:1]))
