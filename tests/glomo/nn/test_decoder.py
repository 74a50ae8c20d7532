import pytest
import torch

import glomo.nn.decoder as decoder_module
import glomo.nn.losses as losses
from glomo.nn import ContextDecoder
from glomo.nn.decoder import drawn_units, sample_positions


def inputs(dim=6, vocabulary=11):
    torch.manual_seed(0)
    table = torch.randn(vocabulary, dim, dtype=torch.float64, requires_grad=True)
    tokens, lengths = torch.randint(1, vocabulary, (3, 7)), torch.tensor([7, 4, 1])
    features = torch.randn(3, 7, dim, dtype=torch.float64, requires_grad=True)
    return table, tokens, lengths, features, ContextDecoder(dim, 2).double()


def by_hand(decoder, table, tokens, lengths, features, positions, horizon):
    """Each decoder by itself through nn.GRU, its units picked with plain lists."""
    found = []
    for row, length in enumerate(lengths.tolist()):
        for t in positions[row]:
            ahead = tokens[row, t + 1 : min(t + 1 + horizon, length)]
            if len(ahead) == 0:
                continue
            fed = torch.cat([torch.zeros_like(table[:1]), table[ahead[:-1]]])
            out, _ = decoder.rnn(fed, features[row, t].expand(2, -1).contiguous())
            logits = (out @ table.T)[:, 1:]  # nothing is padding
            found.append(torch.nn.functional.cross_entropy(logits, ahead - 1, reduction="none"))
    return torch.cat(found).mean()


@pytest.mark.parametrize("horizon", [1, 3, 20])
@pytest.mark.parametrize("chunk", [1, 10**9], ids=["one row a chunk", "one chunk"])
def test_loss_and_gradient_do_not_depend_on_the_chunks(horizon, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", {"cpu": chunk, "cuda": chunk})
    table, tokens, lengths, features, decoder = inputs()
    positions = torch.arange(6).expand(3, -1)
    start = features[:, :6]
    loss = decoder(start, positions, horizon, tokens, lengths, table[tokens], table)
    expected = by_hand(decoder, table, tokens, lengths, features, positions.tolist(), horizon)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    wanted = [table, features, *decoder.parameters()]
    for found, right in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(found, right)


def test_each_pair_counts_once_and_none_past_the_end(monkeypatch):
    table, tokens, lengths, features, decoder = inputs()
    count = []

    def watched(output, weight, targets, **rest):
        count.append(int((targets > 0).sum()))
        return output.sum() * 0

    monkeypatch.setattr(decoder_module, "smoothed_cross_entropy", watched)
    decoder(features, torch.arange(7).expand(3, -1), 3, tokens, lengths, table[tokens], table)
    assert sum(count) == sum(1 for n in (7, 4, 1) for t in range(n) for d in (1, 2, 3) if t + d < n)


def test_the_prediction_of_a_unit_never_reads_it():
    """Step d reads units up to t + d - 1: unit t + d moves the losses of later steps only."""
    table, tokens, lengths, features, decoder = inputs()
    embedded = table[tokens].detach().requires_grad_()
    position = torch.tensor([[2], [2], [2]])
    for horizon in (1, 2, 3):
        loss = decoder(features[:, 2:3], position, horizon, tokens, lengths, embedded, table)
        (gradient,) = torch.autograd.grad(loss, embedded)
        read = gradient[0].abs().sum(-1) > 0
        assert read.tolist() == [3 <= t < 2 + horizon for t in range(7)]


def test_positions_are_drawn_without_replacement_where_there_is_a_next_unit():
    lengths = torch.tensor([9, 5, 2, 1, 0])
    generator = torch.Generator().manual_seed(0)
    seen = [set() for _ in lengths]
    for _ in range(200):
        positions = sample_positions(lengths, 9, 4, generator)
        assert positions.shape == (5, 4)
        for row, length in enumerate(lengths.tolist()):
            chosen = positions[row].tolist()
            assert len(set(chosen)) == 4
            useful = [t for t in chosen if t < length - 1]
            assert len(useful) == min(4, max(length - 1, 0))
            seen[row].update(useful)
    assert seen == [set(range(8)), {0, 1, 2, 3}, {0}, set(), set()]


def test_positions_repeat_with_the_generator():
    lengths = torch.full((4,), 50)
    first, second = (sample_positions(lengths, 50, 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sample_positions(lengths, 50, 5, torch.Generator().manual_seed(4)))


def test_drawn_units_are_all_where_there_are_few():
    table, tokens, lengths, features, decoder = inputs()
    arguments = (features, torch.arange(7).expand(3, -1), 3, tokens, lengths)
    wanted = [table, features, *decoder.parameters()]
    exact = decoder(*arguments, table[tokens], table)
    drawn = decoder(*arguments, table[tokens], table, 100, torch.Generator().manual_seed(0))
    assert drawn.item() == pytest.approx(exact.item(), rel=1e-12)
    for found, right in zip(torch.autograd.grad(drawn, wanted), torch.autograd.grad(exact, wanted), strict=True):
        torch.testing.assert_close(found, right)


def test_the_sum_over_drawn_units_has_the_right_mean():
    torch.manual_seed(0)
    logits, targets = torch.randn(40, dtype=torch.float64), torch.tensor([[3, 7, 0], [7, 9, 3]])
    generator, sums = torch.Generator().manual_seed(1), []
    for _ in range(4000):
        units, places, added = drawn_units(targets, 40, 5, generator)
        assert units[0] == 0
        assert units.tolist()[:4] == [0, 3, 7, 9]
        assert len(set(units.tolist())) == 9
        assert torch.equal(units[places], targets)
        sums.append((logits[units] + added)[1:].exp().sum())
    sums = torch.stack(sums)
    error = sums.std() / len(sums) ** 0.5
    assert sums.mean().item() == pytest.approx(logits[1:].exp().sum().item(), abs=4 * error.item())


def test_drawn_units_when_every_unit_is_a_target():
    units, places, added = drawn_units(torch.arange(5), 5, 3)
    assert units.tolist() == places.tolist() == [0, 1, 2, 3, 4]
    assert not added.any()
