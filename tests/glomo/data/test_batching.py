"""Padding, windows and bucketed batches: nothing lost, nothing doubled, the same order every time."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glomo.data import BucketBatches, TokenBatches, Vocabulary, Windows, pad, read_texts
from glomo.errors import UserError

HAMLET = Path(__file__).parents[2] / "data" / "hamlet-act-1.txt"


class Numbers:
    """A vocabulary for tests: the text "7 8" has the ids 7 and 8."""

    pad_id, unk_id, fingerprint = 0, 1, ""

    def __len__(self):
        return 1_000_000

    def encode(self, text):
        return [int(word) for word in text.split()]

    def tokens(self, text):
        return text.split()

    def to_dict(self):
        return {}


def numbered(*sizes: int) -> list[str]:
    """Texts of these many units, all units different."""
    starts = [2 + sum(sizes[:i]) for i in range(len(sizes))]
    return [" ".join(map(str, range(start, start + size))) for start, size in zip(starts, sizes, strict=True)]


def test_pad():
    tokens, lengths = pad([[3, 4, 5], [], torch.tensor([6])])
    assert tokens.tolist() == [[3, 4, 5], [0, 0, 0], [6, 0, 0]]
    assert lengths.tolist() == [3, 0, 1]
    assert tokens.dtype == lengths.dtype == torch.int64
    assert pad([])[0].shape == (0, 0)


def test_every_unit_is_used_where_the_released_iterator_skips_most():
    """It keeps its place in a document when it moves to the next one; here every unit is in one window, in order."""
    sizes = (500, 450, 600, 700, 300)
    windows = Windows(numbered(*sizes), Numbers(), length=100)
    assert torch.cat([windows[i] for i in range(len(windows))]).tolist() == list(range(2, 2 + sum(sizes)))
    assert len(windows) == 5 + 5 + 6 + 7 + 3
    assert windows.left_out == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 20), st.booleans())
def test_windows(sizes, minimum, more, join):
    length = 2 * minimum - 1 + more
    kept = [sum(sizes)] if join else sizes
    kept_sizes = [size for size in kept if size >= minimum]
    if not kept_sizes:
        with pytest.raises(UserError, match=f"has {max(kept)} units, but at least {minimum} are needed"):
            Windows(numbered(*sizes), Numbers(), length, minimum, join)
        return
    windows = Windows(numbered(*sizes), Numbers(), length, minimum, join)
    assert windows.left_out == len(kept) - len(kept_sizes)
    assert len(windows) == sum(-(-size // length) for size in kept_sizes)
    assert all(minimum <= n <= length for n in windows.lengths.tolist())
    parts = [windows[i].tolist() for i in range(len(windows))]
    assert [len(part) for part in parts] == windows.lengths.tolist()
    units = [
        unit for text in numbered(*sizes) if join or len(text.split()) >= minimum for unit in map(int, text.split())
    ]
    assert [unit for part in parts for unit in part] == units
    if not join:  # no window crosses the end of a text
        ends = {sum(sizes[: i + 1]) + 1 for i in range(len(sizes))}
        assert all(not (set(part[:-1]) & ends) for part in parts)
    tokens, lengths = windows.batch([len(windows) - 1, 0])
    assert lengths.tolist() == [len(parts[-1]), len(parts[0])]
    assert tokens[1, : lengths[1]].tolist() == parts[0]


def test_windows_on_real_text():
    texts = read_texts(HAMLET)
    vocabulary = Vocabulary.build(texts, 1000)
    windows = Windows(texts, vocabulary, 64, minimum=4, join=True)
    assert torch.cat([windows[i] for i in range(len(windows))]).tolist() == [
        unit for text in texts for unit in vocabulary.encode(text)
    ]
    assert windows.lengths.min() >= 63


def test_window_errors():
    with pytest.raises(UserError, match="has 3 units, but at least 4 are needed: one to read and 3 to predict"):
        Windows(["2 3", "2 3 4"], Numbers(), 20, minimum=4)
    with pytest.raises(UserError, match="has 0 units"):
        Windows([], Numbers(), 20, join=True)
    with pytest.raises(UserError, match="windows of 6 units are too short: at least 7"):
        Windows(numbered(50), Numbers(), 6, minimum=4)


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=150)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_holds_every_example_once(lengths, batch_size, seed, epoch):
    batches = BucketBatches(lengths, batch_size, seed)
    plan = batches.epoch(epoch)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    assert len(plan) == len(batches) == -(-len(lengths) // batch_size)
    assert sum(len(batch) != batch_size for batch in plan) <= 1
    for place, batch in enumerate(plan):
        assert batches.batch(epoch * len(batches) + place) == batch


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 8), st.integers(1, 4), st.integers(0, 2))
def test_ranks_have_equal_and_disjoint_shares(lengths, per_rank, world_size, epoch):
    if len(lengths) < world_size:
        return
    batch_size = per_rank * world_size
    ranks = [BucketBatches(lengths, batch_size, 5, rank, world_size).epoch(epoch) for rank in range(world_size)]
    whole = [set(batch) for batch in BucketBatches(lengths, batch_size, 5).epoch(epoch)]
    together = []
    for shares in zip(*ranks, strict=True):
        assert len({len(share) for share in shares}) == 1
        union = [i for share in shares for i in share]
        assert any(set(union) <= batch for batch in whole)  # the same global batches as one process
        together += union
    # Whole batches are whole; the last one loses what cannot be shared equally.
    assert len(together) == len(set(together)) == len(lengths) - len(lengths) % batch_size % world_size
    assert all(len(rank) == len(BucketBatches(lengths, batch_size, 5, 0, world_size)) for rank in ranks)


def test_the_order_is_a_pure_function_of_seed_and_step():
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0))
    run = BucketBatches(lengths, 32, seed=3)
    undisturbed = [run.batch(step) for step in range(100)]
    for step in (99, 0, 57, 32, 31, 64):  # a resumed run starts anywhere, in another object
        assert BucketBatches(lengths.tolist(), 32, seed=3).batch(step) == undisturbed[step]
    assert run.epoch(0) != run.epoch(1)
    assert BucketBatches(lengths, 32, seed=4).epoch(0) != run.epoch(0)


def test_batches_hold_similar_lengths():
    lengths = torch.randint(1, 200, (4000,), generator=torch.Generator().manual_seed(0))

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches)

    plan = BucketBatches(lengths, 32, seed=0).epoch(0)
    plain = torch.randperm(4000, generator=torch.Generator().manual_seed(1)).split(32)
    units = int(lengths.sum())
    assert padded(plan) < 1.05 * units
    assert padded([batch.tolist() for batch in plain]) > 1.8 * units
    # Shuffled all the same: short batches do not all come first.
    means = torch.tensor([lengths[batch].double().mean() for batch in plan])
    assert abs(float(torch.corrcoef(torch.stack([means, torch.arange(len(plan)).double()]))[0, 1])) < 0.3


def test_bucket_errors():
    with pytest.raises(UserError, match="no example"):
        BucketBatches([], 4, 0)
    with pytest.raises(UserError, match="batch size of 0"):
        BucketBatches([1, 2], 0, 0)
    with pytest.raises(UserError, match="multiple of 3"):
        BucketBatches([1, 2, 3], 4, 0, world_size=3)
    with pytest.raises(UserError, match="2 examples cannot be shared by 4"):
        BucketBatches([1, 2], 4, 0, world_size=4)


def test_token_batches_hold_every_example_once_an_epoch_and_no_more_units_than_asked():
    lengths = torch.randint(1, 30, (500,)).tolist()
    batches = TokenBatches(lengths, 64, seed=3)
    epochs = [[batches.batch(step) for step in range(n * len(batches), (n + 1) * len(batches))] for n in (0, 1, 2)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(500))
        assert all(max(lengths[i] for i in batch) * len(batch) <= 64 for batch in epoch)
    assert epochs[0] != epochs[1]
    padding = 1 - sum(lengths) / sum(max(lengths[i] for i in batch) * len(batch) for batch in epochs[0])
    assert padding < 0.1
    again = TokenBatches(lengths, 64, seed=3)
    assert again.batch(2 * len(batches) + 5) == epochs[2][5], "a function of seed and step alone"
    assert TokenBatches(lengths, 64, seed=4).batch(0) != epochs[0][0]


def test_token_batches_say_what_does_not_fit():
    with pytest.raises(UserError, match="an example has 65 units, and a batch takes 64"):
        TokenBatches([3, 65], 64, seed=0)
    with pytest.raises(UserError, match="no example"):
        TokenBatches([], 64, seed=0)
