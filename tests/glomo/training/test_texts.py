"""Files of one's own come first; the synthetic task reads as text."""

from itertools import pairwise

import pytest

from glomo.data import catalogue
from glomo.data.recall import Recall
from glomo.errors import UserError
from glomo.training.texts import LabelledData, labelled, unlabelled


def test_files_before_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "load_texts", lambda name, split: [f"{name} {split}"])
    monkeypatch.setattr(catalogue, "load_labelled", lambda name, split: [(f"{name} {split}", "l")])
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"body": "three", "y": "p"}\n')
    b = str(tmp_path / "b.jsonl")
    assert unlabelled((str(tmp_path / "a.txt"),), ("x",), "text") == ["one", "two"]
    assert unlabelled((str(tmp_path / "a.txt"), str(tmp_path / "a.txt")), (), "text") == ["one", "two"] * 2
    assert unlabelled((b,), ("x",), "body") == ["three"]
    assert unlabelled((), ("x", "y"), "text") == ["x train", "y train"]
    assert labelled(LabelledData(b, b, "x", "body", "y")) == ([("three", "p")], [("three", "p")])
    assert labelled(LabelledData(dataset="x")) == ([("x train", "l")], [("x test", "l")])
    assert labelled(LabelledData(dataset="x", test_dataset="y")) == ([("x train", "l")], [("y test", "l")])
    with pytest.raises(UserError, match="names no text"):
        unlabelled((), (), "text")


def test_recall_is_the_task_itself_and_asks_for_every_pair():
    texts = unlabelled((), ("recall",), "text")
    task = Recall()
    for text, units in zip(texts[:200], task.unlabelled(len(texts), 1), strict=False):
        ids = task.vocabulary.encode(text)
        assert ids[: len(units)] == units
        body, questions = text.split()[: task.length], text.split()[task.length :]
        bound = {key: value for key, value in pairwise(body) if key[0] == "K"}
        assert len(questions) == 3 * task.pairs
        assert questions[::3] == ["Q"] * task.pairs
        assert dict(zip(questions[1::3], questions[2::3], strict=True)) == bound
    train, test = labelled(LabelledData(dataset="recall"))
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert {label for _, label in test} == {str(n) for n in range(Recall().classes)}
