"""Names as vectors, and ConSE, against sums by hand."""

import math

import numpy as np
import pytest
import torch

from glomo.transfer.zero_shot import conse_embedding, hit_at_k, label_scores, label_vectors

WORDS = {
    "polar": [3.0, 0.0, 0.0],
    "bear": [0.0, 4.0, 0.0],
    "ice": np.array([1.0, 1.0, 0.0], dtype=np.float32),
    "cat": torch.tensor([0.0, 0.0, -2.0]),
    "x-ray": [0.0, 0.5, -0.5],
    "Turkey": [1.0, 0.0, 1.0],
    "turkey": [0.0, 1.0, 1.0],
}


def test_names_of_one_word_and_of_several():
    found = label_vectors(["cat", "polar bear", "Polar_Bear cat", "ice/bear", "X-ray", "Turkey", "TURKEY"], WORDS)
    means = [(0, 0, -2), (1.5, 2, 0), (1, 4 / 3, -2 / 3), (0.5, 2.5, 0), (0, 0.5, -0.5), (1, 0, 1), (0, 1, 1)]
    expected = [[v / math.sqrt(sum(w * w for w in mean)) for v in mean] for mean in means]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.norm(dim=1).numpy(), np.ones(7), atol=1e-6)


def test_names_that_say_the_same():
    with pytest.raises(ValueError, match=r"classes 'cat bear' and 'bear_cat' have the same vector"):
        label_vectors(["cat bear", "ice", "bear_cat"], WORDS)
    with pytest.raises(ValueError, match=r"two classes are called 'cat'"):
        label_vectors(["cat", "cat"], WORDS)


def test_names_without_a_vector():
    message = r"the label 'polar ox' has no vector: looked up were 'polar ox', 'polar', 'ox', without a vector are 'ox'"
    with pytest.raises(ValueError, match=message):
        label_vectors(["cat", "polar ox"], WORDS)
    with pytest.raises(ValueError, match=r"the label 'yak' has no vector: looked up were 'yak', without"):
        label_vectors(["yak"], WORDS)
    with pytest.raises(ValueError, match=r"the label ' ' has no vector"):
        label_vectors([" "], WORDS)
    with pytest.raises(ValueError, match=r"no name of a class"):
        label_vectors([], WORDS)


def test_vectors_that_are_none():
    words = {
        **WORDS,
        "nothing": [0.0, 0.0, 0.0],
        "broken": [math.nan, 0.0, 0.0],
        "opposite": [-3.0, 0, 0],
        "long": [1.0] * 4,
    }
    for name in ("nothing", "broken", "polar opposite"):
        with pytest.raises(ValueError, match=rf"the vector of the label '{name}' has no direction"):
            label_vectors(["cat", name], words)
    with pytest.raises(ValueError, match=r"vectors have 3 \('cat'\) and 4 \('long'\) numbers"):
        label_vectors(["cat", "long"], words)
    with pytest.raises(ValueError, match=r"the words of the label 'long cat' have vectors of 4, 3 numbers"):
        label_vectors(["long cat"], words)


def conse_oracle(p, s, top):
    result = []
    for row in p:
        order = sorted(range(len(row)), key=lambda c: -row[c])[:top]
        z = sum(row[c] for c in order)
        result.append(sum(row[c] * s[c] for c in order) / z)
    return np.array(result)


@pytest.mark.parametrize("top", [1, 3, 10, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conse(top, dtype):
    generator = torch.Generator().manual_seed(top)
    p = torch.randn(4, 13, generator=generator).to(dtype).softmax(1)
    s = torch.randn(13, 5, generator=generator).to(dtype)
    found = conse_embedding(p, s, top)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(found.numpy(), conse_oracle(p.numpy(), s.numpy(), top), rtol=tolerance, atol=tolerance)
    if top == 10:
        assert torch.equal(found, conse_embedding(p, s))  # the published T
    if top == 1:
        torch.testing.assert_close(found, s[p.argmax(1)])


def test_conse_finds_what_lies_between():
    """Half lion and half tiger: what was never seen and has its name between them."""
    words = {"lion": [1.0, 0.1, 0.0], "tiger": [0.1, 1.0, 0.0], "car": [0.0, 0.0, 1.0], "liger": [1.0, 1.0, 0.1]}
    words["truck"] = [0.1, 0.0, 1.0]
    seen, unseen = label_vectors(["lion", "tiger", "car"], words), label_vectors(["truck", "liger"], words)
    p = torch.tensor([[0.5, 0.45, 0.05], [0.1, 0.0, 0.9]])
    scores = label_scores(conse_embedding(p, seen), unseen, cosine=True)
    assert hit_at_k(scores, torch.tensor([1, 0])) == 1
    first = (0.5 * seen[0] + 0.45 * seen[1] + 0.05 * seen[2]).double().numpy()
    cosine = first @ unseen[1].double().numpy() / np.linalg.norm(first)
    assert scores[0, 1].item() == pytest.approx(cosine, abs=1e-6)


def test_conse_in_half_precision():
    p, s = torch.randn(3, 12).softmax(1), torch.randn(12, 4)
    exact = conse_embedding(p, s)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conse_embedding(p, s), exact)
    torch.testing.assert_close(
        conse_embedding(p.bfloat16(), s.bfloat16(), 99), conse_embedding(p, s, 99), rtol=0.1, atol=0.05
    )
    assert conse_embedding(p[:0], s).shape == (0, 4)


def test_mistakes_of_conse():
    p, s = torch.full((2, 3), 1 / 3), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"probabilities have the shape \(2, 3\) and labels \(4, 4\)"):
        conse_embedding(p, torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"top is 0; at least 1"):
        conse_embedding(p, s, 0)
    with pytest.raises(ValueError, match=r"go down to -1.5; .* softmax of logits first"):
        conse_embedding(torch.tensor([[0.1, -1.5, 2.0]]), s)
    with pytest.raises(ValueError, match=r"go down to 0; "):
        conse_embedding(torch.zeros(1, 3), s)
