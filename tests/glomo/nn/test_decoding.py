"""Greedy and beam search beside an exhaustive search over a small table of transition probabilities."""

import itertools

import pytest
import torch

from glomo.errors import UserError
from glomo.nn.decoding import beam_search, greedy, sample

END, LONGEST = 4, 4


class Table:
    """Log-probabilities that depend on the last two units, one table a sentence."""

    def __init__(self, tables):
        self.tables, self.rows = tables, torch.arange(len(tables))
        self.before = torch.full((len(tables),), END)

    def step(self, tokens):
        found = self.tables[self.rows, self.before, tokens]
        self.before = tokens
        return found

    def select(self, rows):
        self.rows, self.before = self.rows[rows], self.before[rows]


def tables(batch=6):
    return torch.randn(batch, 5, 5, 5).mul(1.5).log_softmax(-1)


def best(table, length_penalty):
    """(score, sequence) over all sequences of up to LONGEST units, those without an end only at full length."""
    found = []
    for length in range(LONGEST + 1):
        for units in itertools.product(range(END), repeat=length):
            before, last, total = END, END, 0.0
            for unit in (*units, END) if length < LONGEST else units:
                total += float(table[before, last, unit])
                before, last = last, unit
            found.append((total / ((5 + length + 1) / 6) ** length_penalty, list(units)))
    return max(found)[1]


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.5])
def test_a_wide_beam_finds_the_best_sequence(length_penalty):
    table = tables()
    found = beam_search(Table(table), 6, END, LONGEST, beam=300, length_penalty=length_penalty)
    assert found == [best(t, length_penalty) for t in table]


def test_a_beam_of_one_without_a_penalty_is_greedy():
    table = tables(40)
    assert beam_search(Table(table), 40, END, 12, beam=1, length_penalty=0.0) == greedy(Table(table), 40, END, 12)


def test_greedy_takes_the_best_unit_each_time():
    table = tables()
    for t, out in zip(table, greedy(Table(table), 6, END, 12), strict=True):
        before, last = END, END
        for unit in [*out, END][:12]:
            assert int(t[before, last].argmax()) == unit
            before, last = last, unit


def test_a_sentence_does_not_depend_on_its_batch():
    table = tables(8)
    together = beam_search(Table(table), 8, END, 10, beam=3)
    assert together == [beam_search(Table(t[None]), 1, END, 10, beam=3)[0] for t in table]


def test_a_beam_wider_than_the_vocabulary_and_no_room():
    table = tables(2)
    assert beam_search(Table(table), 2, END, 1, beam=50) == [best_of_one(t) for t in table]
    assert greedy(Table(table), 2, END, 0) == [[], []]


def best_of_one(table):
    """At most one unit: nothing, or the best unit by itself."""
    scores = {(): float(table[END, END, END])}
    scores |= {(unit,): float(table[END, END, unit]) / (7 / 6) ** 0.6 for unit in range(END)}
    return list(max(scores, key=scores.get))


def test_samples_have_the_models_probabilities():
    table, generator = tables(1), torch.Generator().manual_seed(0)
    p = table[0, END, END].exp()
    counts = torch.zeros(5)
    for _ in range(3000):
        found = sample(Table(table), [END], END, 1, generator=generator)
        counts[found[0] if found else END] += 1
    torch.testing.assert_close(counts / 3000, p, atol=0.04, rtol=0)  # four standard deviations of a share


def test_a_sample_goes_on_from_its_prompt():
    table = tables(1)
    expected, before, last = [], 1, 2  # without randomness the most probable unit each time
    while len(expected) < 6 and (unit := int(table[0, before, last].argmax())) != END:
        expected, before, last = [*expected, unit], last, unit
    assert sample(Table(table), [END, 1, 2], END, 6, top_k=1) == expected
    assert sample(Table(table), [END, 1, 2], END, 6, temperature=1e-3) == expected
    assert sample(Table(table), [END, 1, 2], END, 6, temperature=1e-40) == expected
    assert sample(Table(table), [END], END, 0) == []


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ([], {}, "no units"),
        ([END], {"temperature": 0.0}, "temperature is 0.0"),
        ([END], {"top_k": -1}, "top_k -1"),
        ([END], {"temperature": float("nan")}, "temperature is nan"),
        ([END], {"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_bad_samples(prompt, options, sentence):
    with pytest.raises(UserError, match=sentence):
        sample(Table(tables(1)), prompt, END, 3, **options)


def test_no_beam():
    with pytest.raises(UserError, match="a beam of 0"):
        beam_search(Table(tables(1)), 1, END, 3, beam=0)
