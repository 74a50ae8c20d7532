"""Surface tasks: labels recounted from the texts, balance, and nothing that gives a class away."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from glomo.transfer.probing import (
    PUBLISHED_BINS,
    content_task,
    layer_features,
    length_task,
    position_task,
    shift_task,
)

HAMLET = Path(__file__).parents[3] / "data" / "hamlet-act-1.txt"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def texts():
    return [line for line in HAMLET.read_text(encoding="utf-8").splitlines() if line.strip()]


def balanced(task):
    counts = Counter(task.labels)
    assert set(counts) == set(range(len(task.classes)))
    assert len(set(counts.values())) == 1
    return counts[0]


def test_published_bins():
    assert PUBLISHED_BINS == ((5, 8), (9, 12), (13, 16), (17, 20), (21, 25), (26, 28))
    texts = ["w " * n for n in [*range(1, 40), *range(5, 29)]]
    task = length_task(texts, seeded(), PUBLISHED_BINS)
    assert balanced(task) == 6  # 26, 27, 28, twice each
    assert task.classes == ["5-8", "9-12", "13-16", "17-20", "21-25", "26-28"]
    assert task.left_out == len(texts) - 36
    for text, label, source in zip(task.texts, task.labels, task.sources, strict=True):
        first, last = PUBLISHED_BINS[label]
        assert first <= len(text.split()) <= last
        assert text == texts[source]
    assert task.sources == sorted(set(task.sources))


def test_quantile_bins(texts):
    task = length_task(texts, seeded(1))
    ranges = [tuple(map(int, name.split("-"))) if "-" in name else (int(name),) * 2 for name in task.classes]
    lengths = [len(text.split()) for text in texts]
    assert len(ranges) == 6
    assert ranges[0][0] == min(lengths)
    assert ranges[-1][1] == max(lengths)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
    for text, label in zip(task.texts, task.labels, strict=True):
        assert ranges[label][0] <= len(text.split()) <= ranges[label][1]
    balanced(task)
    # up to the end of each range there are as nearly k / 6 of the texts as at the end of any length
    for number, (_, last) in enumerate(ranges[:-1], 1):
        off = {n: abs(sum(m <= n for m in lengths) - len(lengths) * number / 6) for n in set(lengths)}
        assert off[last] == min(off.values())
    again = length_task(texts, seeded(1))
    assert again == task
    assert length_task(texts, seeded(2)).sources != task.sources


def test_quantiles_of_few_lengths():
    assert length_task(["a", "a b", "a b c"], seeded(), 3).classes == ["1", "2", "3"]
    # three quarters have one length: the others still get a bin each
    task = length_task(["a"] * 9 + ["a b", "a b c", "a b c d"], seeded(), 3)
    assert task.classes == ["1", "2", "3-4"]
    assert length_task(["a", "a b"] + ["a b c"] * 9, seeded(), 3).classes == ["1", "2", "3"]
    with pytest.raises(ValueError, match="the texts have 2 different lengths; 3 bins need at least 3"):
        length_task(["a", "a b"], seeded(), 3)


def test_content(texts):
    task = content_task(texts, seeded(), words=12, first_rank=20, per_word=3)
    size = balanced(task)
    assert size >= 3
    counts = Counter(token.lower() for text in texts for token in text.split())
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    assert all(len(word) >= 4 and ranked.index(word) >= 20 for word in task.classes)
    for text, label in zip(task.texts, task.labels, strict=True):
        tokens = [token.lower() for token in text.split()]
        assert [t for t in tokens if t in task.classes] == [task.classes[label]]


def test_content_leaves_out_as_few_words_as_it_can():
    """`rare` goes first; then `both`'s sentences with it are `both`'s alone, and are enough."""
    texts = ["both rare x"] * 3 + ["other y"] * 3 + ["third z"] * 4
    task = content_task(texts, seeded(), words=10, first_rank=0, per_word=3)
    assert sorted(task.classes) == ["both", "other", "third"]
    assert balanced(task) == 3
    given = content_task(texts, seeded(), words=["Other", "third"], per_word=3)
    assert given.classes == ["other", "third"]
    assert given.left_out == len(texts) - 6
    with pytest.raises(ValueError, match="'both' is alone in 0 sentences; at least 1"):
        content_task(texts, seeded(), words=["both", "rare", "other"], per_word=1)
    twice = content_task(["deed deed", "deed a", "word b"], seeded(), words=["deed", "word"], per_word=1)
    assert "deed deed" not in twice.texts


def test_shift(texts):
    task = shift_task(texts, seeded(3))
    assert balanced(task) > 20
    assert len(set(task.sources)) == len(task.sources)  # no sentence in both forms
    for text, label, source in zip(task.texts, task.labels, task.sources, strict=True):
        before, after = texts[source].split(), text.split()
        places = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert text == " ".join(after)
        if not label:
            assert not places
            continue
        first, second = places
        assert second == first + 1 >= 2
        assert (after[first], after[second]) == (before[second], before[first])
        for token in before[first : second + 1]:
            assert any(c.isalnum() for c in token)
    assert shift_task(texts, seeded(3)) == task
    assert shift_task(texts, seeded(4)) != task


def test_every_text_could_be_in_either_class():
    able = ["one two three", "a  b   c", "x y z", "k l m"]
    unable = ["one two", "a b b", "a . b", 'say "you are" good', "", "a the The", "a b ! ?"]
    found = [shift_task([*unable, *able], seeded(seed)) for seed in range(20)]
    assert {source for task in found for source in task.sources} == {7, 8, 9, 10}
    assert all(task.left_out == len(unable) for task in found)
    for label in (0, 1):
        assert {s for task in found for s, y in zip(task.sources, task.labels, strict=True) if y == label} == {
            7,
            8,
            9,
            10,
        }
    assert all(text in ("a b c", "a c b") for task in found for text in task.texts if text.startswith("a"))


def test_positions_match_the_rows_of_the_features():
    lengths = [4, 1, 3, 3, 0, 5]
    task = position_task(lengths, 3, seeded())
    owners = [(text, place) for text, n in enumerate(lengths) for place in range(n)]
    assert Counter(task.labels.tolist()) == {0: 4, 1: 4, 2: 4}
    for row, label, text in zip(task.rows.tolist(), task.labels.tolist(), task.documents.tolist(), strict=True):
        assert owners[row] == (text, label)
    assert len(set(task.rows.tolist())) == 12
    embedding = torch.nn.Embedding(5, 2)
    units = torch.arange(5).expand(3, 5)  # the unit is its position
    features = layer_features(torch.nn.Sequential(embedding), ["0"], [units], [torch.tensor([4, 1, 3])])["0"]
    task = position_task([4, 1, 3], 3, seeded())
    assert torch.equal(features[task.rows], embedding.weight.detach()[task.labels])


def test_mistakes():
    with pytest.raises(ValueError, match=r"the ranges of lengths are \[\(1, 3\), \(3, 5\)\]"):
        length_task(["a"], seeded(), [(1, 3), (3, 5)])
    with pytest.raises(ValueError, match="at least two"):
        length_task(["a"], seeded(), [(1, 3)])
    with pytest.raises(ValueError, match="no text is of the class '4-5'"):
        length_task(["a"], seeded(), [(1, 3), (4, 5)])
    with pytest.raises(ValueError, match="0 of 0 words have 120 sentences"):
        content_task(["a text"], seeded())
    with pytest.raises(ValueError, match="the words are same, same"):
        content_task(["a text"], seeded(), ["same", "Same"])
    with pytest.raises(ValueError, match="1 of 2 texts have two adjacent words"):
        shift_task(["a b c", "a"], seeded())
    with pytest.raises(ValueError, match="positions is 1"):
        position_task([3], 1, seeded())
    with pytest.raises(ValueError, match="no text is of the class 'position 3'"):
        position_task([3, 2], 4, seeded())
