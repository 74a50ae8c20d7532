"""Key-value recall: the label is what the sequence binds to the asked key, and nothing else gives it away."""

from collections import Counter

import pytest

from glomo.data import Vocabulary
from glomo.data.recall import Recall
from glomo.errors import UserError


def solve(words: list[str]) -> str:
    """Read a sequence as a person would: the value that stands behind the first place of the asked key."""
    assert words[-2] == "Q"
    return words[words.index(words[-1]) + 1]


def number(value: str) -> int:
    """The number of a value's word: Va is 0, Vb is 1, ..."""
    found = 0
    for letter in value.removeprefix("V"):
        found = 26 * found + "abcdefghijklmnopqrstuvwxyz".index(letter)
    return found


@pytest.mark.parametrize("task", [Recall(), Recall(keys=5, values=60, fillers=1, pairs=5, length=13, classes=3)])
def test_the_label_is_the_class_of_the_bound_value(task):
    words = task.vocabulary.words
    for ids, label in task.labelled(200, seed=1):
        read = [words[i] for i in ids]
        assert len(read) == task.length + 2
        assert number(solve(read)) % task.classes == label
        keys = [word for word in read[:-2] if word.startswith("K")]
        assert len(keys) == len(set(keys)) == task.pairs
        assert sum(word.startswith("V") for word in read) == task.pairs
        assert all(read[read.index(key) + 1].startswith("V") for key in keys)


@pytest.mark.parametrize("task", [Recall(), Recall(keys=3, values=4, fillers=2, pairs=3, length=9, classes=2)])
def test_unlabelled_sequences_ask_for_every_pair_and_answer(task):
    first: Counter[int] = Counter()
    for ids in task.unlabelled(400, seed=2):
        read = [task.vocabulary.words[i] for i in ids]
        assert len(read) == task.length + 3 * task.pairs
        body, questions = read[: task.length], read[task.length :]
        assert questions[::3] == ["Q"] * task.pairs
        keys = [word for word in body if word.startswith("K")]
        assert sorted(questions[1::3]) == sorted(keys)
        for key, value in zip(questions[1::3], questions[2::3], strict=True):
            assert value == solve([*body, "Q", key])
        first[keys.index(questions[1])] += 1
    # the order of the questions says nothing about that of the pairs
    assert all(0.7 * 400 < first[place] * task.pairs < 1.3 * 400 for place in range(task.pairs))


def test_reproducible_and_different_by_seed():
    task = Recall()
    assert task.labelled(20, seed=3) == task.labelled(20, seed=3)
    assert task.labelled(20, seed=3) != task.labelled(20, seed=4)


def test_without_the_link_the_label_cannot_be_told():
    """Classes are balanced, the bag of values gives little away, and the asked pair is at any place."""
    task = Recall()
    examples = task.labelled(2000, seed=5)
    counts = Counter(label for _, label in examples)
    assert max(counts.values()) < 0.28 * 2000
    right = 0
    places: Counter[int] = Counter()
    for ids, label in examples:
        read = [task.vocabulary.words[i] for i in ids]
        classes = Counter(number(word) % task.classes for word in read if word.startswith("V"))
        right += classes.most_common(1)[0][0] == label
        places[[word for word in read if word.startswith("K")].index(read[-1])] += 1
    assert right / 2000 < 0.55
    assert all(400 < places[i] < 600 for i in range(4))


def test_the_vocabulary_reads_its_own_words():
    task = Recall()
    ids, _ = task.labelled(1, seed=0)[0]
    text = " ".join(task.vocabulary.words[i] for i in ids)
    assert task.vocabulary.encode(text) == ids


def test_the_words_stay_apart_in_any_vocabulary():
    task = Recall(keys=60)
    words = task.vocabulary.words[2:]
    assert len(Vocabulary.build([" ".join(words)], 1000)) == len(task.vocabulary)


@pytest.mark.parametrize(
    "wrong",
    [{"pairs": 17}, {"pairs": 0}, {"length": 7}, {"classes": 1}, {"classes": 17}, {"fillers": 0}, {"values": 1}],
)
def test_impossible_sizes(wrong):
    with pytest.raises(UserError, match="recall"):
        Recall(**wrong)
