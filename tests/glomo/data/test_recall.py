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


def test_unlabelled_sequences_end_with_the_answer():
    task = Recall()
    for ids in task.unlabelled(100, seed=2):
        read = [task.vocabulary.words[i] for i in ids]
        assert read[-1] == solve(read[:-1])


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
