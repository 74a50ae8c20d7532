"""Scores of words against all paths counted one by one, and names that were never heard."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from glomo.transfer.zero_shot import Lexicon, aligned_word_scores, ctc_word_scores, hit_at_k

DIGITS = """
;;; in CMUdict's notation
ZERO  Z IH1 R OW0
ZERO(1)  Z IY1 R OW0
ONE  W AH1 N
ONE(1)  HH W AH1 N
TWO  T UW1
THREE  TH R IY1
FOUR  F AO1 R
FIVE  F AY1 V
SIX  S IH1 K S
SEVEN  S EH1 V AH0 N
EIGHT  EY1 T
NINE  N AY1 N
"""
NAMES = """
Steve  S T IY1 V
Ray  R EY1
Nora  N AO1 R AH0
Kate  K EY1 T
Wes  W EH1 S  # a comment, too
Tony  T OW1 N IY0
Kevin  K EH1 V IH0 N
Ivan  AY1 V AH0 N
Zoe  Z OW1 IY0
Ruth  R UW1 TH
"""


def test_the_notation():
    lexicon = Lexicon.parse(DIGITS)
    assert lexicon.words == ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert " ".join(lexicon.phonemes) == "AH AO AY EH EY F HH IH IY K N OW R S T TH UW V W Z"
    assert lexicon.owners.tolist() == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert lexicon.lengths.tolist() == [4, 4, 3, 4, 2, 3, 3, 3, 4, 5, 2, 3]
    sounds = [lexicon.phonemes[i - 1] for i in lexicon.targets[9].tolist()]
    assert sounds == ["S", "EH", "V", "AH", "N"]
    assert lexicon.targets[4].tolist() == [15, 17, 0, 0, 0]
    assert "IH1" in Lexicon.parse(DIGITS, stress=True).phonemes
    assert len(Lexicon.parse("A  AH0\nA(1)  AH1\nA(2)  EY1").owners) == 2  # the same without stress: once


def ctc_oracle(log_probs, target):
    """The sum over every path of T units that collapses to the target."""
    p, total = np.exp(log_probs), 0.0
    for path in itertools.product(range(p.shape[1]), repeat=len(p)):
        collapsed = [unit for unit, _ in itertools.groupby(path) if unit != 0]
        if collapsed == target:
            total += math.prod(p[t, unit] for t, unit in enumerate(path))
    return total


def small():
    """a has one pronunciation, b two, c repeats a phoneme (the paths need a blank between), d is long."""
    return Lexicon({"a": [["X"]], "b": [["X", "Y"], ["Y"]], "c": [["Y", "Y"]], "d": [["X", "Y", "X", "Y"]]})


def posteriors(b, t, classes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, t, classes, generator=generator, dtype=torch.float64).log_softmax(-1).to(dtype)


@pytest.mark.parametrize("t", [1, 2, 3, 5])
def test_ctc_counts_all_paths(t):
    lexicon, log_probs = small(), posteriors(2, t, 3)
    found = ctc_word_scores(log_probs, torch.tensor([t, 1]), lexicon).exp().numpy()
    targets = [[[1]], [[1, 2], [2]], [[2, 2]], [[1, 2, 1, 2]]]
    for row, size in enumerate((t, 1)):
        one = log_probs[row, :size].numpy()
        expected = [sum(ctc_oracle(one, target) for target in word) for word in targets]
        np.testing.assert_allclose(found[row], expected, rtol=1e-12)


def test_words_that_do_not_fit():
    found = ctc_word_scores(posteriors(1, 2, 3), torch.tensor([2]), small())[0].tolist()
    assert found[2:] == [-math.inf, -math.inf]  # c needs three frames, d four
    assert all(math.isfinite(score) for score in found[:2])


@pytest.mark.parametrize("t", [1, 2, 4, 6])
def test_aligned_products(t):
    lexicon, log_probs = small(), posteriors(3, t, 3)
    sizes = [t, 1, max(1, t - 1)]
    found = aligned_word_scores(log_probs, torch.tensor(sizes), lexicon).exp().numpy()
    targets = [[[1]], [[1, 2], [2]], [[2, 2]], [[1, 2, 1, 2]]]
    for row, size in enumerate(sizes):
        p = np.exp(log_probs[row].numpy())
        expected = [
            sum(math.prod(p[i, unit] for i, unit in enumerate(one)) for one in word if len(one) == size)
            for word in targets
        ]
        np.testing.assert_allclose(found[row], expected, rtol=1e-12)


@pytest.mark.parametrize("score", [ctc_word_scores, aligned_word_scores])
def test_batch_mates_padding_and_dtypes_do_not_matter(score):
    lexicon, log_probs = small(), posteriors(3, 4, 3)
    lengths = torch.tensor([4, 2, 1])
    found = score(log_probs, lengths, lexicon)
    other = log_probs.clone()
    other[1, 2:] = math.nan
    other[2, 1:] = 0
    assert torch.equal(score(other, lengths, lexicon), found)
    torch.testing.assert_close(score(other[1:2, :2], lengths[1:2], lexicon), found[1:2])
    torch.testing.assert_close(score(log_probs.float(), lengths, lexicon), found.float())
    assert score(log_probs.bfloat16(), lengths, lexicon).dtype == torch.float32
    assert torch.equal(score(log_probs, lengths, copy.deepcopy(lexicon)), found)
    assert not score(log_probs.requires_grad_(), lengths, lexicon).requires_grad
    assert score(log_probs[:0], lengths[:0], lexicon).shape == (0, 4)


@pytest.mark.parametrize("score", [ctc_word_scores, aligned_word_scores])
def test_large_lexicons_in_parts(score, monkeypatch):
    log_probs, lengths = posteriors(2, 5, 3), torch.tensor([5, 2])
    found = score(log_probs, lengths, small())
    monkeypatch.setattr("glomo.transfer.zero_shot.phonemes._CHUNK", 2)
    torch.testing.assert_close(score(log_probs, lengths, small()), found)


def test_noisy_phonemes_at_each_position():
    """Right phonemes get most of the probability, names follow; none of them is an example of anything."""
    digits = Lexicon.parse(DIGITS)
    names = Lexicon.parse(NAMES, phonemes=digits.phonemes)
    log_probs, lengths, targets = [], [], []
    generator = torch.Generator().manual_seed(0)
    for word, sounds, size in zip(names.owners, names.targets, names.lengths, strict=True):
        logits = 3.5 * F.one_hot(sounds, 21) + torch.randn(5, 21, generator=generator)
        log_probs.append(logits.log_softmax(-1))
        lengths.append(size)
        targets.append(word)
    scores = aligned_word_scores(torch.stack(log_probs), torch.stack(lengths), names)
    assert hit_at_k(scores, torch.stack(targets)) == 1


def test_names_that_were_never_heard():
    """A recogniser of phonemes learns from digits by CTC, and then knows names by their entries in the lexicon."""
    digits = Lexicon.parse(DIGITS)
    names = Lexicon.parse(NAMES, phonemes=digits.phonemes)
    generator = torch.Generator().manual_seed(0)
    sounds = torch.randn(21, 16, generator=generator)

    def speak(lexicon, repeats):
        """Each phoneme sounds for two or three frames, and there is noise. The first pronunciation of each word."""
        frames, lengths, places = [], [], []
        first = [lexicon.owners.tolist().index(word) for word in range(len(lexicon.words))]
        for place in first * repeats:
            units = lexicon.targets[place, : lexicon.lengths[place]]
            long = torch.randint(2, 4, (len(units),), generator=generator)
            clean = sounds[units.repeat_interleave(long)]
            frames.append(clean + 0.3 * torch.randn(clean.shape, generator=generator))
            lengths.append(len(clean))
            places.append(place)
        return nn.utils.rnn.pad_sequence(frames, batch_first=True), torch.tensor(lengths), torch.tensor(places)

    torch.manual_seed(0)
    model = nn.Linear(16, 21)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    frames, lengths, places = speak(digits, 12)
    for _ in range(80):
        optimizer.zero_grad()
        log_probs = model(frames).log_softmax(-1).transpose(0, 1)
        F.ctc_loss(log_probs, digits.targets[places], lengths, digits.lengths[places]).backward()
        optimizer.step()
    frames, lengths, places = speak(names, 5)
    log_probs = model(frames).log_softmax(-1)
    targets = names.owners[places]
    assert hit_at_k(ctc_word_scores(log_probs, lengths, names), targets) > 0.9
    both = Lexicon.parse(DIGITS + NAMES, phonemes=digits.phonemes)  # the words that it has heard compete
    assert hit_at_k(ctc_word_scores(log_probs, lengths, both), targets + len(digits.words)) > 0.9


def test_mistakes():
    with pytest.raises(ValueError, match=r"line 3 of the lexicon is 'THREE'; a word and its phonemes"):
        Lexicon.parse("ONE  W AH1 N\n\nTHREE\n")
    with pytest.raises(ValueError, match=r"the lexicon has no word"):
        Lexicon.parse(";;; nothing")
    with pytest.raises(ValueError, match=r"the word 'hugh' has the phoneme 'Y'; the recogniser knows HH UW$"):
        Lexicon.parse("HUGH  HH Y UW1", phonemes=["HH", "UW"])
    with pytest.raises(ValueError, match=r"the phoneme 'HH' stands twice"):
        Lexicon({"a": [["HH"]]}, phonemes=["HH", "UW", "HH"])
    for none in ([], [[]]):
        with pytest.raises(ValueError, match=r"the word 'a' has the pronunciations \[.*\]; at least 1 phoneme"):
            Lexicon({"a": none})
    for text in ("HH UW", ["HH", "UW"]):
        with pytest.raises(TypeError, match=r"the pronunciations of 'who' are .*; a sequence of sequences"):
            Lexicon({"who": text})
    lexicon, log_probs = small(), posteriors(2, 4, 3)
    for score in (ctc_word_scores, aligned_word_scores):
        with pytest.raises(ValueError, match=r"shape \(2, 4, 2\) and lengths \(2,\); \(B, T, 3\)"):
            score(log_probs[:, :, :2], torch.tensor([4, 4]), lexicon)
        with pytest.raises(ValueError, match=r"lengths \(1,\)"):
            score(log_probs, torch.tensor([4]), lexicon)
        with pytest.raises(ValueError, match=r"lengths go from 0 to 5; from 1 to 4"):
            score(log_probs, torch.tensor([0, 5]), lexicon)
