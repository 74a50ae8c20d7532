"""Users' own files: what is read, and the sentence for everything that can be wrong with a file."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glomo.data import encode_labels, label_names, read_labelled, read_pairs, read_texts
from glomo.data.files import read_labelled_pairs
from glomo.errors import UserError

SAMPLES = Path(__file__).parents[2] / "data"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sentence(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400 + sum(len(str(a)) for a in args)
    return message


def test_samples_are_read():
    lines = read_texts(SAMPLES / "hamlet-act-1.txt")
    assert lines[0] == "Who's there?"
    assert len(lines) == 868
    examples = read_labelled(SAMPLES / "speeches-train.csv")
    assert len(examples) == 160
    assert label_names(examples) == ["As You Like It", "Hamlet"]
    # An unrelated count of the same rows: quotes are balanced, so the labels end the lines.
    raw = (SAMPLES / "speeches-train.csv").read_text()
    assert sum(label == "Hamlet" for _, label in examples) == raw.count(",Hamlet\n") == 80


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_txt_is_one_text_a_line(tmp_path, end, mark):
    path = write(tmp_path, "a.txt", mark + end.join(["eins  zwei", "", "  drei\u2028vier ", " \t", "fünf\x0bsechs"]))
    assert read_texts(path) == ["eins  zwei", "drei\u2028vier", "fünf\x0bsechs"]
    assert read_texts(str(path)) == read_texts(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv(tmp_path, end, mark):
    rows = ["label,text,more", 'a,"one, ""two""",1', "", 'b,"line' + end + 'break",2', "a,plain,3", ""]
    path = write(tmp_path, "a.CSV", mark + end.join(rows))
    assert read_labelled(path) == [('one, "two"', "a"), (f"line{end}break", "b"), ("plain", "a")]
    assert read_texts(path, column="more") == ["1", "2", "3"]


def test_csv_with_a_huge_field(tmp_path):
    limit = csv.field_size_limit()
    big = "word " * 100_000
    assert read_texts(write(tmp_path, "a.csv", f"text\n{big}\n")) == [big.strip()]
    assert csv.field_size_limit() == limit  # the process-wide setting is put back


def test_tsv_has_no_quoting(tmp_path):
    path = write(tmp_path, "a.tsv", 'text\tlabel\n"open quote\tx\nhe said "no"\ty\n\n')
    assert read_labelled(path) == [('"open quote', "x"), ('he said "no"', "y")]


def test_jsonl(tmp_path):
    records = [{"text": "a\u2028b", "label": 1}, {"label": True, "text": "c\nd"}, {"text": "e", "label": "1", "x": {}}]
    path = write(tmp_path, "a.jsonl", "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    assert read_labelled(path) == [("a\u2028b", "1"), ("c\nd", "true"), ("e", "1")]


TEXT = st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1))
def test_what_the_standard_writers_write_is_read_back(tmp_path, rows):
    wanted = [(text.strip(), label.strip()) for text, label in rows]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        writer.writerows((label, text) for text, label in rows)
    assert read_labelled(tmp_path / "a.csv") == wanted
    lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_labelled(tmp_path / "a.jsonl") == wanted


def test_a_path_that_is_no_readable_file(tmp_path):
    assert "does not exist" in sentence(read_texts, tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    assert "is a folder" in sentence(read_texts, tmp_path / "folder.txt")
    assert "'.pdf'" in sentence(read_texts, tmp_path / "a.pdf")
    assert ".jsonl" in sentence(read_texts, tmp_path / "a")
    assert "no labels" in sentence(read_labelled, tmp_path / "a.txt")


@pytest.mark.parametrize("content", ["", "\ufeff", "\n \r\n\t\n"])
@pytest.mark.parametrize("extension", [".txt", ".csv", ".tsv", ".jsonl"])
def test_empty_files(tmp_path, content, extension):
    path = write(tmp_path, "a" + extension, content)
    assert "is empty" in sentence(read_texts, path)
    if extension != ".txt":
        assert "is empty" in sentence(read_labelled, path)


def test_header_alone_and_blank_texts(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\n")
    assert "holds no text" in sentence(read_texts, path)
    assert "no example" in sentence(read_labelled, path)
    path = write(tmp_path, "b.csv", "text,label\nx,y\n  ,z\n")
    assert read_texts(path) == ["x"]
    assert "line 3: the field 'text' is blank" in sentence(read_labelled, path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_not_utf8_says_the_byte_offset(tmp_path, mark):
    content = mark + "text\nschön\n".encode() + b"caf\xe9\n"
    for extension in (".txt", ".csv", ".jsonl"):
        message = sentence(read_texts, write(tmp_path, "a" + extension, content))
        assert f"byte 0xe9 at offset {content.index(0xE9)} " in message
    assert "offset 0 " in sentence(read_texts, write(tmp_path, "b.txt", "text".encode("utf-16")))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,texts,Lable\n1,x,y\n"),
        ("a.tsv", "id\ttexts\tLable\n1\tx\ty\n"),
        ("a.jsonl", '{"id": 1, "texts": "x", "Lable": "y"}\n'),
    ],
)
def test_a_missing_column_is_named_with_the_nearest_first(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert "no column 'text'; the columns there are: 'texts'" in sentence(read_texts, path)
    message = sentence(read_labelled, path, text_column="texts")
    assert "no column 'label'; the columns there are: 'Lable'" in message
    assert "'id'" in message


def test_a_file_without_header_gives_a_readable_sentence(tmp_path):
    columns = ",".join(f"some quite long text that is no header at all {i}" for i in range(30))
    assert "and 24 more" in sentence(read_texts, write(tmp_path, "a.csv", columns))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", "text,label\nfine,a\none, two,b\n", "line 3: 3 fields where the header has 2"),
        ("a.csv", 'text,label\n"two\nlines",a\nshort\n', "line 4: 1 fields"),
        ("a.csv", 'text,label\nfine,a\n"never closed,b\nmore,c\n', "not well-formed CSV"),
        ("a.csv", 'text,label\n"closed" early,b\n', "line 2: not well-formed CSV"),
        ("a.tsv", "text\tlabel\nonly one\n", "line 2: 1 fields"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n\n{"text": "a", \n', "line 3: not valid JSON"),
        ("a.jsonl", '["a", "b"]\n', "line 1: a JSON list"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"}\n', "line 2: no column 'label'"),
        ("a.jsonl", "{}\n", "there are no columns at all"),
        ("a.jsonl", '{"text": ["a"], "label": "b"}\n', "'text' is [\"a\"]"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "'label' is null"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not valid JSON"),
    ],
)
def test_broken_rows_are_named_by_their_line(tmp_path, name, content, found):
    assert found in sentence(read_labelled, write(tmp_path, name, content))


def test_labels():
    assert label_names([("x", "b"), ("y", "a"), ("z", "b")]) == ["a", "b"]
    assert encode_labels(["b", "a", "b"], ["a", "b"]) == [1, 0, 1]
    assert "one class only, 'b'" in sentence(label_names, [("x", "b"), ("z", "b")])
    assert "no example" in sentence(label_names, [])
    message = sentence(encode_labels, ["negative", "postive"], ["negative", "neutral", "positive"])
    assert "'postive' is unknown; the known labels are 'positive'" in message


def test_pairs_of_every_kind_of_file(tmp_path):
    expected = [("Go.", "Ve."), ("I see, you see.", "Veo, ves.")]
    files = {
        "a.tsv": "source\tid\ttarget\nGo.\t1\tVe.\nI see, you see.\t2\tVeo, ves.\n",
        "a.csv": 'target,source\nVe.,Go.\n"Veo, ves.","I see, you see."\n',
        "a.jsonl": "".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in expected),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_text(content)
        assert read_pairs(path) == expected
        assert read_pairs(path, "target", "source") == [(b, a) for a, b in expected]


def test_pairs_that_are_not_whole(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("source\ttarget\nGo.\tVe.\nWait.\t \n")
    with pytest.raises(UserError, match=r"line 3: the field 'target' is blank, .* a source and a target"):
        read_pairs(path)
    path.write_text("source\tspanish\nGo.\tVe.\n")
    with pytest.raises(UserError, match="target"):
        read_pairs(path)
    path.write_text("source\ttarget\n")
    with pytest.raises(UserError, match="no example"):
        read_pairs(path)


def test_labelled_pairs(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,pair,label\nOne?, first one ,yes\nTwo?,second,no\n")
    assert read_labelled_pairs(path) == [("One?", "first one", "yes"), ("Two?", "second", "no")]
    assert read_labelled_pairs(path, "pair", "text", "label")[0] == ("first one", "One?", "yes")
    path.write_text("text,pair,label\nOne?, ,yes\n")
    with pytest.raises(UserError, match="line 2: the field 'pair' is blank, but every example needs two texts and a"):
        read_labelled_pairs(path)
    with pytest.raises(UserError, match="'premise'"):
        read_labelled_pairs(path, "premise")
