"""The rule that cuts words, and the table of ids."""

import hashlib
import json
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glomo.data import Vocabulary, check_same_vocabulary, read_texts, vocabulary_from_dict
from glomo.data.vocabulary import split_words
from glomo.errors import UserError

HAMLET = Path(__file__).parents[2] / "data" / "hamlet-act-1.txt"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Who's there?", "who 's there ?"),
        ("It didn\u2019t; we'll, I'd, you've.", "it didn 't ; we 'll , i 'd , you 've ."),
        ("'Tis 'quoted' o'clock", "' tis ' quoted ' o ' clock"),
        ("the '60s cost $1,000.50, at 10:30.", "the ' 60s cost $ 1,000.50 , at 10:30 ."),
        ("3.14.15 1.x x.1 1. 1,a", "3.14.15 1 . x x . 1 1 . 1 , a"),
        ("state-of-the-art snake_case a/b", "state - of - the - art snake _ case a / b"),
        ("Tab\tand\nline\u00a0end\u3000here", "tab and line end here"),
        ("„Größe“ — naïve…", "„ größe “ — naïve …"),
        ("cafe\u0301 हिन्दी भाषा", "café हिन्दी भाषा"),
        ("<pad> <unk>", "< pad > < unk >"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_the_rule(text, words):
    assert split_words(text) == words.split()


def test_case_is_kept_when_asked():
    assert split_words("It'S DIDN'T", lowercase=False) == ["It", "'S", "DIDN", "'T"]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_nothing_but_white_space_is_lost(text):
    normal = unicodedata.normalize("NFC", text).replace("\u2019", "'")
    assert "".join(split_words(text, lowercase=False)) == "".join(normal.split())


def test_most_frequent_first_and_ties_by_the_word():
    vocabulary = Vocabulary.build(["b a c", "b A d 7", "e 3rd b"], max_size=6)
    # b 3; a 2; the digit mark 2 ("7" and "3rd"): "N" sorts before "a"; then c, d, e 1 each.
    assert vocabulary.words == ["<pad>", "<unk>", "b", "N", "a", "c"]
    assert vocabulary.encode("c 19 e a B") == [5, 3, 1, 4, 2]
    assert vocabulary.tokens("C 19 e") == ["c", "19", "e"]


def test_build_against_a_plain_count():
    texts = read_texts(HAMLET)
    vocabulary = Vocabulary.build(texts, max_size=500, min_count=2, digits=None)
    counts = Counter(word for text in texts for word in split_words(text))
    best = sorted(((-n, word) for word, n in counts.items() if n >= 2))[:498]
    assert vocabulary.words[2:] == [word for _, word in best]
    for text in texts[:50]:
        expected = [vocabulary.words.index(w) if w in vocabulary.words else 1 for w in split_words(text)]
        assert vocabulary.encode(text) == expected
        assert len(vocabulary.tokens(text)) == len(expected)
    # The order of the texts has no part in it.
    assert Vocabulary.build(texts[::-1], 500, 2, digits=None).fingerprint == vocabulary.fingerprint


def test_digits():
    texts = ["in 1999 and 2001", "the 3rd b2b deal of 1,000"]
    marked = Vocabulary.build(texts, 20)
    assert marked.encode("1,234.5 x9 N") == [marked.words.index("N")] * 2 + [1]  # a written "N" is lowered to "n"
    kept = Vocabulary.build(texts, 20, digits=None)
    assert kept.words[kept.encode("1999")[0]] == "1999"
    assert kept.encode("1998") == [1]
    assert Vocabulary(["a"], digits="N").encode("7 a") == [1, 2]  # without the mark among the words: unknown


def test_limits():
    texts = ["a b c d e", "a b"]
    assert len(Vocabulary.build(texts, max_size=4)) == 4
    assert len(Vocabulary.build(texts, max_size=3)) == 3
    assert len(Vocabulary.build(texts, max_size=100, min_count=2)) == 4
    with pytest.raises(UserError, match="at most 2 entries"):
        Vocabulary.build(texts, max_size=2)
    with pytest.raises(UserError, match="hold 5 different words, none of them 3 times"):
        Vocabulary.build(texts, max_size=9, min_count=3)
    with pytest.raises(UserError, match="hold 0 different words"):
        Vocabulary.build([], max_size=9)
    with pytest.raises(TypeError, match="not one string"):
        Vocabulary.build("a text", max_size=9)


def test_saved_and_restored():
    vocabulary = Vocabulary.build(read_texts(HAMLET), 300)
    saved = json.loads(json.dumps(vocabulary.to_dict()))
    restored = vocabulary_from_dict(saved)
    assert isinstance(restored, Vocabulary)
    assert restored.words == vocabulary.words
    assert restored.fingerprint == vocabulary.fingerprint
    assert restored.encode("To be, or not to be: 1603") == vocabulary.encode("To be, or not to be: 1603")
    canonical = json.dumps(saved, sort_keys=True, separators=(",", ":"))
    assert restored.fingerprint == hashlib.sha256(canonical.encode()).hexdigest()
    for other in (Vocabulary(vocabulary.words[2:], lowercase=False), Vocabulary(vocabulary.words[2:], digits=None)):
        assert other.fingerprint != vocabulary.fingerprint


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"kind": "letters"},
        {"kind": ["words"]},
        None,
        {"kind": "words"},
        {"kind": "words", "words": ["a", 1], "lowercase": True, "digits": None},
        {"kind": "words", "words": ["a", ""], "lowercase": True, "digits": None},
        {"kind": "words", "words": ["a", "a"], "lowercase": True, "digits": None},
        {"kind": "words", "words": ["<pad>"], "lowercase": True, "digits": None},
        {"kind": "words", "words": ["a"], "lowercase": "yes", "digits": None},
        {"kind": "words", "words": ["a"], "lowercase": True, "digits": 3},
        {"kind": "subwords"},
        {"kind": "subwords", "tokenizer": {"model": None}},
    ],
)
def test_damaged_forms_are_refused(saved):
    with pytest.raises(UserError, match="vocabulary"):
        vocabulary_from_dict(saved)


def test_a_mismatch_names_both():
    one, two = Vocabulary(["a", "b"]), Vocabulary(["a"])
    check_same_vocabulary(one, Vocabulary(["a", "b"]), "the checkpoint")
    with pytest.raises(UserError) as caught:
        check_same_vocabulary(one, two, "the checkpoint")
    message = str(caught.value)
    assert message.startswith("the checkpoint has the vocabulary " + two.fingerprint[:12] + " of 3 entries")
    assert one.fingerprint[:12] + " of 4 entries" in message


def test_import_stays_light():
    code = (
        "import sys, glomo.data, glomo.data.catalogue, glomo.cli.data; "
        "print([m for m in ('tokenizers', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_buckets_keep_unknown_words_apart():
    plain, bucketed = (Vocabulary.build(["a b c"], 100, digits=None, buckets=n) for n in (0, 50))
    assert len(bucketed) == len(plain) + 50
    assert bucketed.encode("a c") == plain.encode("a c")
    names = bucketed.encode("Osbourne 1990 osbourne zzz")
    assert names[0] == names[2]
    assert len(set(names)) == 3
    assert all(id >= len(plain) for id in names)
    assert plain.encode("Osbourne 1990") == [1, 1]
    assert bucketed.decode(names[:1]) == f"<unk-{names[0] - len(plain)}>"
    assert bucketed.encode("1990") == [len(plain) + zlib.crc32(b"1990") % 50]
    again = vocabulary_from_dict(json.loads(json.dumps(bucketed.to_dict())))
    assert again.words == bucketed.words
    assert again.fingerprint == bucketed.fingerprint != plain.fingerprint
    assert "buckets" not in plain.to_dict()  # saved vocabularies without them are what they were
    marked = Vocabulary.build(["a 7"], 100, buckets=5)
    assert marked.encode("9") == marked.encode("7")  # numbers have their mark first
    for wrong in (-1, "3", True):
        with pytest.raises(UserError, match="buckets"):
            vocabulary_from_dict({**plain.to_dict(), "buckets": wrong})
    with pytest.raises(UserError, match="-2 buckets"):
        Vocabulary(["a"], buckets=-2)
