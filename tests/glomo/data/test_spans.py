"""Files of SQuAD's form, the official scores, and pairs made of questions."""

import json

import pytest

from glomo.data import Vocabulary
from glomo.data.spans import SpanExample, exact_match, inference_pairs, normal_answer, read_spans, span_f1
from glomo.errors import UserError

PARAGRAPH = "Oslo is a city. It lies in Norway! The king lives there."


def squad(answer="Norway", start=None, question="Where does Oslo lie?"):
    start = PARAGRAPH.index(answer) if start is None else start
    asked = {"question": question, "answers": [{"answer_start": start, "text": answer}]}
    return {"data": [{"title": "Oslo", "paragraphs": [{"context": PARAGRAPH, "qas": [asked]}]}]}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_file_is_read(tmp_path):
    (example,) = read_spans(write(tmp_path / "x.json", squad()))
    assert example == SpanExample("Where does Oslo lie?", PARAGRAPH, ((27, "Norway"),), "Oslo")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("no json", "not of SQuAD's form"),
        ({"data": [{"paragraphs": [{"qas": [{}]}]}]}, "KeyError: 'context'"),
        ([], "not of SQuAD's form"),
        ({"data": []}, "holds no question"),
        (squad(start=3), "'Norway' to 'Where does Oslo lie.' is said to stand at character 3"),
        (squad(start=-6), "character -6"),
        (squad(answer=""), "where '' stands"),
    ],
)
def test_a_broken_file_is_a_sentence(tmp_path, content, sentence):
    with pytest.raises(UserError, match=sentence):
        read_spans(write(tmp_path / "x.json", content))


def test_a_question_without_an_answer_and_a_missing_file(tmp_path):
    broken = squad()
    broken["data"][0]["paragraphs"][0]["qas"][0]["answers"] = []
    with pytest.raises(UserError, match="has no answer"):
        read_spans(write(tmp_path / "x.json", broken))
    with pytest.raises(UserError, match="does not exist"):
        read_spans(tmp_path / "nothing.json")


def test_scores_are_the_official_ones():
    """Cases worked out by hand with the rules of SQuAD's evaluation."""
    assert normal_answer("The  U.S. of A.!") == ["us", "of"]
    assert exact_match("the Beatles", ["Beatles"]) == 1
    assert exact_match("Beatles band", ["Beatles", "a band"]) == 0
    assert span_f1("Beatles band", ["Beatles", "none"]) == pytest.approx(2 / 3)
    assert span_f1("big big dog", ["big dog"]) == pytest.approx(0.8)  # 2 common, 3 and 2 words
    assert span_f1("big dog", ["big big"]) == pytest.approx(0.5)
    assert span_f1("cat", ["dog"]) == 0
    assert span_f1("the", ["a"]) == 1  # nothing is left of either
    assert span_f1("the", ["dog"]) == 0
    assert span_f1("1,000", ["1000"]) == 1


def test_pairs_for_inference():
    example = SpanExample("What lies in Norway?", PARAGRAPH, ((0, "Oslo"),))
    assert inference_pairs([example]) == [
        ("What lies in Norway?", "Oslo is a city.", "entailment"),
        ("What lies in Norway?", "It lies in Norway!", "not_entailment"),  # shares more words than the last one
    ]
    text = "He came to the U.S. in 1.5 years. Dr. Smith did not. Why? (No one knows.) 1990 passed."
    around = SpanExample("When?", text, ((text.index("U.S. in 1.5"), "U.S. in 1.5"),))
    assert inference_pairs([around])[0][1] == "He came to the U.S. in 1.5 years."
    within = SpanExample("Who?", text, ((text.index("Dr. Smith"), "Dr. Smith"),))
    assert inference_pairs([within])[0][1] == "Dr. Smith did not."
    alone = SpanExample("Who?", "One sentence only.", ((0, "One"),))
    assert inference_pairs([alone]) == []
    everywhere = SpanExample("Who?", "Ann sings. Bob and Ann dance.", ((0, "Ann"),))
    assert inference_pairs([everywhere]) == [("Who?", "Ann sings.", "entailment")]


def test_places_of_words():
    vocabulary = Vocabulary.build(["a b"], 10)
    for text in (PARAGRAPH, "It\u2019s 1,000.50 — caf\u00e9, O'Neil's?", ""):
        found = [text[start:end] for start, end in vocabulary.spans(text)]
        assert [word.lower().replace("\u2019", "'") for word in found] == vocabulary.tokens(text)
    with pytest.raises(UserError, match="normal form"):
        vocabulary.spans("\u2126 x \u212b\u037e ;")  # NFC turns the Greek question mark into a semicolon
