"""Subword vocabularies through the tokenizers library."""

import json
import sys
from pathlib import Path

import pytest

from glomo.data import Subwords, read_texts, vocabulary_from_dict
from glomo.errors import UserError

pytest.importorskip("tokenizers")
TEXTS = read_texts(Path(__file__).parents[2] / "data" / "hamlet-act-1.txt")


@pytest.fixture(scope="module")
def subwords() -> Subwords:
    return Subwords.train(TEXTS, 600)


def test_the_shared_interface(subwords):
    assert len(subwords) == 600
    assert (subwords.pad_id, subwords.unk_id) == (0, 1)
    ids = subwords.encode("To be, or not to be")
    assert len(subwords.tokens("To be, or not to be")) == len(ids)
    assert subwords.tokens("To be, or not to be") == ["To", "be", ",", "or", "not", "to", "be"]
    assert all(2 <= i < 600 for i in ids)
    assert subwords.encode("") == []


def test_every_text_is_encoded_without_the_reserved_ids(subwords):
    for text in ("naïve 😀 हिन्दी \x00", "<pad><unk>", " <pad> ", "\t\n"):
        ids = subwords.encode(text)
        assert ids
        assert not {0, 1} & set(ids)
        assert len(subwords.tokens(text)) == len(ids)
    assert subwords.encode("caf\u00e9") == subwords.encode("cafe\u0301")


def test_no_information_is_lost(subwords):
    """The bytes of the pieces, put together by the byte table of GPT-2 (written down here again), give the text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    pieces = {i: piece for piece, i in subwords.to_dict()["tokenizer"]["model"]["vocab"].items()}
    for text in (*TEXTS[:20], "naïve 😀 日本語"):
        found = bytes(table[c] for i in subwords.encode(text) for c in pieces[i])
        assert found.decode().removeprefix(" ") == text


def test_training_is_deterministic(subwords):
    assert Subwords.train(iter(TEXTS), 600).fingerprint == subwords.fingerprint
    assert Subwords.train(TEXTS, 500).fingerprint != subwords.fingerprint


def test_saved_and_restored(subwords):
    restored = vocabulary_from_dict(json.loads(json.dumps(subwords.to_dict())))
    assert isinstance(restored, Subwords)
    assert restored.fingerprint == subwords.fingerprint
    assert restored.to_dict() == subwords.to_dict()
    for text in TEXTS[:20]:
        assert restored.encode(text) == subwords.encode(text)


def test_too_small():
    with pytest.raises(UserError, match="258"):
        Subwords.train(TEXTS, 257)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install"):
        Subwords.train(TEXTS, 600)
