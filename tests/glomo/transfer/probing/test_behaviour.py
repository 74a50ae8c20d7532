"""Minimal pairs: the grammar of the templates, and scores of models whose probabilities are written down."""

import math
from collections import Counter

import pytest
import torch

from glomo.data import Vocabulary
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.transfer.probing import MinimalPair, agreement_pairs, log_probability, minimal_pairs, next_unit

PAIRS = agreement_pairs()
VOCABULARY = Vocabulary.build([s for pair in PAIRS for s in pair.sentences], 500)
PLURAL = {"are", "were", "have", "do", "laugh", "work", "wait", "sing"}
NOUNS = {
    pair.before.split()[place] for pair in PAIRS for place in (1, 4) if place == 1 or "number" in pair.construction
}


def favours(words):
    """A model that gives these words most of the probability, whatever came before."""
    logits = torch.zeros(len(VOCABULARY))
    for word in words:
        logits[VOCABULARY.encode(word)] = 5.0
    return lambda units: logits.log_softmax(-1)


def test_templates():
    assert len(PAIRS) == len({pair.sentences for pair in PAIRS}) == 96
    of = Counter(pair.construction for pair in PAIRS)
    assert set(of.values()) == {16}
    for pair in PAIRS:
        assert (pair.right in PLURAL) != (pair.wrong in PLURAL)
        right, wrong = (sentence.split() for sentence in pair.sentences)
        assert len(right) == len(wrong)
        assert [(a, b) for a, b in zip(right, wrong, strict=True) if a != b] == [(pair.right, pair.wrong)]
        subject, plural = right[1], pair.right in PLURAL
        assert (subject.endswith("s") or subject == "men") == plural
        if pair.construction.startswith(("phrase", "clause")):
            other = right[4]  # the noun of the phrase or clause agrees with the subject or not, as the name says
            is_plural = other.endswith("s") or other == "men"
            assert is_plural == (plural if "same" in pair.construction else not plural)
    for name in of:
        assert sum(pair.right in PLURAL for pair in PAIRS if pair.construction == name) == 8
    assert MinimalPair("phrase, other number", "the keys to the house", "are", "is", "here") in PAIRS


@pytest.mark.parametrize("scoring", ["verb", "sentence"])
def test_models_that_know_no_grammar(scoring):
    """Always the plural: half are right. All alike: an equal probability is wrong."""
    for name, score in minimal_pairs(PAIRS, VOCABULARY.encode, favours(PLURAL), scoring, unknown=1).items():
        assert score.accuracy == 0.5, name
        assert (score.scored, score.unknown, score.incomparable) == (16, 0, 0)
    scores = minimal_pairs(PAIRS, VOCABULARY.encode, favours([]), scoring)
    assert all(score.accuracy == 0 for score in scores.values())


def test_a_model_that_agrees_with_the_last_noun():
    def nearest(units):
        words = VOCABULARY.decode(units).split()
        nouns = [word for word in words if word in NOUNS]
        plural = bool(nouns) and (nouns[-1].endswith("s") or nouns[-1] == "men")
        return favours(PLURAL if plural else {p.right for p in PAIRS} - PLURAL)(units)

    scores = minimal_pairs(PAIRS, VOCABULARY.encode, nearest, unknown=1)
    assert scores["simple"].accuracy == scores["phrase, same number"].accuracy == 1
    assert scores["phrase, other number"].accuracy == 0


def test_the_sentence_sees_what_follows():
    """After the wrong form the model expects another end: only the whole sentence tells."""
    units = {"a": 2, "is": 3, "are": 4, "here": 5, "there": 6}
    table = {(2,): [0.05, 0.05, 0.0, 0.4, 0.5, 0, 0], (2, 3): [0.05] * 5 + [0.7, 0.05], (2, 4): [0.1] * 5 + [0.1, 0.4]}

    def model(prefix):
        return torch.tensor(table[tuple(prefix)]).log()

    def encode(text):
        return [units[w] for w in text.split()]

    pair = MinimalPair("x", "a", "is", "are", "here")
    assert minimal_pairs([pair], encode, model, "verb")["x"].right == 0
    assert minimal_pairs([pair], encode, model, "sentence")["x"].right == 1
    expected = math.log(0.4) + math.log(0.7)
    assert log_probability([2, 3, 5], model, 1) == pytest.approx(expected)


def test_the_end_is_part_of_a_sentence_if_asked():
    def model(prefix):
        if not prefix:
            return torch.tensor([0.5, 0.6, 0.4, 0.0]).log()
        return torch.tensor([0.0, 0.0, 0.0, 0.1 if prefix[-1] == 1 else 0.9]).log()

    pair = MinimalPair("x", "", "2", "1", "")
    encode = lambda text: [int(n) for n in text.split()]
    assert minimal_pairs([pair], encode, model, "sentence")["x"].right == 0
    assert minimal_pairs([pair], encode, model, "sentence", end=3)["x"].right == 1


def test_unknown_words_and_forms_inside_others_are_counted_apart():
    pairs = [
        MinimalPair("x", "a", "b", "c", "d"),
        MinimalPair("x", "a", "b", "c", "unknown"),
        MinimalPair("x", "a", "go", "goes", "d"),
    ]
    # "goes" is "go" and "es", as subwords are
    units = {"a": [2], "b": [3], "c": [4], "d": [5], "go": [6], "goes": [6, 7], "unknown": [1]}
    encode = lambda text: [u for w in text.split() for u in units[w]]
    model = lambda prefix: torch.arange(8.0).flip(0).log_softmax(-1)
    score = minimal_pairs(pairs, encode, model, unknown=1)["x"]
    assert (score.right, score.scored, score.unknown, score.incomparable) == (1, 1, 1, 1)
    score = minimal_pairs(pairs, encode, model, "sentence", unknown=1)["x"]
    assert (score.scored, score.unknown, score.incomparable) == (2, 1, 0)
    assert minimal_pairs(pairs[1:2], encode, model, unknown=1)["x"].accuracy is None


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_glomos_models(kind):
    torch.manual_seed(0)
    if kind == "lstm":
        model = LSTMLanguageModel(AWDLSTMConfig.preset("tiny", vocab_size=20))
    else:
        model = LanguageModel(TransformerConfig.preset("tiny", vocab_size=20))
    model.train()
    function, text = next_unit(model), [3, 7, 5]
    found = log_probability([*text, model.end], function)
    assert model.training
    model.eval()
    inputs, outputs = torch.tensor([[model.end, *text]]), torch.tensor([[*text, model.end]])
    nats = model(inputs, outputs)[1] if kind == "lstm" else model(inputs, outputs)
    assert found == pytest.approx(-4 * float(nats.detach()), rel=1e-5)
    state = model.start()
    with torch.no_grad():
        for unit in (model.end, 3, 7):
            stepwise = state.step(torch.tensor([unit]))[0]
    torch.testing.assert_close(function([3, 7]), stepwise)
    assert next_unit(model.bfloat16())([3]).dtype == torch.float32


def test_mistakes():
    with pytest.raises(ValueError, match="scoring is 'word'"):
        minimal_pairs(PAIRS, VOCABULARY.encode, favours([]), "word")
    with pytest.raises(ValueError, match=r"the log-probabilities are \(1, 5\); a vector that has unit 2"):
        log_probability([2], lambda units: torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"\(5,\); a vector that has unit 7"):
        log_probability([7], lambda units: torch.zeros(5))
