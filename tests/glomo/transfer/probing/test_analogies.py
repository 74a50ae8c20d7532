"""Analogies and similarity against loops over all words in numpy; the formats of the published test sets."""

import numpy as np
import pytest
import torch

from glomo.errors import UserError
from glomo.transfer.probing import analogies, read_analogies, read_similarities, similarity

WORDS = ["king", "queen", "man", "woman", "apple", "Paris", "France"]


def table(seed=0, count=7, dim=5):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cos(a, b):
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def slow_answer(vectors, a, b, c, method):
    best, found = -np.inf, None
    for v in range(len(vectors)):
        if v in (a, b, c):
            continue
        of = [cos(vectors[v], vectors[i]) for i in (a, b, c)]
        if method == "add":
            score = of[1] - of[0] + of[2]
        else:
            x, y, z = ((s + 1) / 2 for s in of)
            score = y * z / (x + 0.001)
        if score > best:
            best, found = score, v
    return found


@pytest.mark.parametrize("method", ["add", "mul"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_question_against_loops(method, dtype):
    vectors = table(1).to(dtype)
    every = [(a, b, c) for a in range(7) for b in range(7) for c in range(7) if len({a, b, c}) == 3]
    answers = [slow_answer(vectors.double().numpy(), *q, method) for q in every]
    right = [tuple(WORDS[i] for i in (*q, d)) for q, d in zip(every, answers, strict=True)]
    wrong = [(*q[:3], WORDS[next(i for i in range(7) if WORDS[i] not in q)]) for q in right]
    scores = analogies(vectors, WORDS, {"right": right, "wrong": wrong}, method)
    assert scores["right"].correct == scores["right"].answered == len(every)
    assert scores["right"].accuracy == 1
    assert scores["wrong"].correct == 0
    assert scores["total"].accuracy == 0.5


def test_methods_differ():
    vectors = table(1).numpy()
    every = [(a, b, c) for a in range(7) for b in range(7) for c in range(7) if len({a, b, c}) == 3]
    assert any(slow_answer(vectors, *q, "add") != slow_answer(vectors, *q, "mul") for q in every)


def test_given_words_are_no_answers():
    """The nearest to b - a + c is b itself, as is usual of real vectors."""
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.05], [0.6, 0.4]])
    scores = analogies(vectors, ["a", "b", "c", "d"], {"s": [("a", "b", "c", "d")]})
    assert scores["s"].correct == 1


def test_unknown_words_are_counted():
    questions = {
        "x": [("king", "queen", "man", "pear"), ("king", "queen", "man", "woman"), ("fig", "pear", "fig", "fig")],
        "nothing": [("fig",) * 4],
    }
    scores = analogies(table(), WORDS, questions)
    assert (scores["x"].answered, scores["x"].unknown, scores["x"].missing) == (1, 2, ("fig", "pear"))
    assert scores["nothing"].accuracy is None
    assert (scores["total"].answered, scores["total"].unknown, scores["total"].missing) == (1, 3, ("fig", "pear"))


def test_cases():
    pairs = [("PARIS", "france", 3.0), ("king", "queen", 2.0), ("man", "apple", 1.0)]
    assert similarity(table(), WORDS, pairs).pairs == 3
    assert similarity(table(), WORDS, pairs, lowercase=False).missing == ("PARIS", "france")
    # the first of equal words has the vector, and there is one candidate of the name
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-0.2, 1.0]])
    found = similarity(vectors, ["a", "A", "b", "c"], [("A", "b", 2.0), ("a", "c", 1.0)])
    assert found.spearman == pytest.approx(1)


def test_similarity_against_numpy():
    vectors = table(2)
    pairs = [(a, b, float((i * 7) % 5)) for i, (a, b) in enumerate(zip(WORDS, WORDS[2:] + WORDS[:2], strict=True))]
    found = similarity(vectors, WORDS, [*pairs, ("king", "pear", 9.0)])
    cosines = [cos(vectors[WORDS.index(a)].numpy(), vectors[WORDS.index(b)].numpy()) for a, b, _ in pairs]
    scores = [score for *_, score in pairs]
    rank = [[sum(y < x for y in v) + (sum(y == x for y in v) + 1) / 2 for x in v] for v in (cosines, scores)]
    assert found.spearman == pytest.approx(np.corrcoef(*rank)[0, 1])
    assert (found.pairs, found.unknown, found.missing) == (7, 1, ("pear",))
    assert similarity(vectors, WORDS, pairs[:1]).spearman is None
    assert similarity(vectors * 1e-3, WORDS, pairs).spearman == pytest.approx(found.spearman)


def test_zero_vectors_are_no_answers_by_accident():
    vectors = table(1)
    vectors[4] = 0
    assert torch.isfinite(torch.tensor(similarity(vectors, WORDS, [("apple", "king", 1), ("man", "king", 2)]).spearman))


def test_files(tmp_path):
    path = tmp_path / "questions-words.txt"
    path.write_text(": capital-common-countries\nAthens Greece Baghdad Iraq\n\n: family\nboy girl  brother sister\n")
    assert read_analogies(path) == {
        "capital-common-countries": [("Athens", "Greece", "Baghdad", "Iraq")],
        "family": [("boy", "girl", "brother", "sister")],
    }
    path = tmp_path / "wordsim353.tsv"
    path.write_text("# The collection\n# Word 1\tWord 2\tHuman (mean)\nlove\tsex\t6.77\r\ntiger\ttiger\t10.00\n")
    assert read_similarities(path) == [("love", "sex", 6.77), ("tiger", "tiger", 10.0)]


@pytest.mark.parametrize(
    ("reader", "content", "words"),
    [
        (read_analogies, "a b c d\n", "line 1: a question before the first section"),
        (read_analogies, ": x\na b c\n", "line 2: 3 words; a question has 4"),
        (read_analogies, ": x\n", "has no question"),
        (read_similarities, "a\tb\tmuch\n", r"line 1: 'a\\tb\\tmuch'; two words and a number"),
        (read_similarities, "# x\na b 1\n", "line 2: 'a b 1'"),
        (read_similarities, "# x\n", "has no pair"),
        (read_similarities, None, "does not exist"),
        (read_analogies, b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_broken_files(reader, content, words, tmp_path):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        reader(path)


def test_mistakes():
    with pytest.raises(ValueError, match=r"the vectors are \(7, 5\) for 2 words"):
        analogies(table(), WORDS[:2], {})
    with pytest.raises(ValueError, match="method is 'sub'"):
        analogies(table(), WORDS, {}, method="sub")
    with pytest.raises(ValueError, match="a section is called 'total'"):
        analogies(table(), WORDS, {"total": []})
