"""The tasks of `glomo transfer` besides labelled texts, from small files to results."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glomo.data import Pixels, Vocabulary, catalogue
from glomo.data.spans import SpanExample
from glomo.errors import UserError
from glomo.nn import GLoMoConfig, UniformGraph
from glomo.training.models import load_graph
from glomo.training.pretrain import PretrainConfig, PretrainData, pretrain
from glomo.training.targets import make_target, own_vocabulary
from glomo.training.targets import words as words_module
from glomo.training.targets.spans import Questions
from glomo.training.targets.target import Setting
from glomo.training.train_config import TrainConfig
from glomo.training.transfer import transfer
from glomo.training.transfer_config import Compare, Features, GraphOptions, Head, TransferConfig, TransferData
from glomo.training.tune import Tune

TRAIN = TrainConfig(
    steps=3, batch_size=8, eval_every=0, checkpoint_every=0, progress=0, device="cpu", threads=1, keep=1
)
TWO = Compare(("none", "uniform"), 1)
NAMES = ["ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Who has what? The answer is the name before the thing asked for."""
    folder = tmp_path_factory.mktemp("spans")
    for part, shift in (("train", 0), ("test", 3)):
        articles = []
        for i in range(24):
            first, second = NAMES[(i + shift) % 8], NAMES[(i * 3 + shift + 1) % 8]
            context = f"{first} has a cat. {second} has a dog."
            asked = [
                {
                    "question": f"Who has a {thing}?",
                    "answers": [{"answer_start": context.index(f"{name} has a {thing}"), "text": name}],
                }
                for name, thing in ((first, "cat"), (second, "dog"))
            ]
            articles.append({"title": f"{part} {i}", "paragraphs": [{"context": context, "qas": asked}]})
        (folder / f"{part}.json").write_text(json.dumps({"data": articles}))
    return TransferData(str(folder / "train.json"), str(folder / "test.json"), length=30)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Do the two name the same one?"""
    folder = tmp_path_factory.mktemp("pairs")
    for part in ("train", "test"):
        with (folder / f"{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["first", "second", "label"])
            for i in range(32):
                name, other = NAMES[i % 8], NAMES[(i + 1 + i // 8) % 8]
                writer.writerow([f"{name} ran", f"it was {name if i % 2 else other}", "yes" if i % 2 else "no"])
    columns = {"text_column": "first", "pair_column": "second"}
    return TransferData(str(folder / "train.csv"), str(folder / "test.csv"), length=30, **columns)


@pytest.fixture
def images(monkeypatch):
    """A bright bar, upright or lying."""

    def load(name, split):
        generator = np.random.default_rng(split == "test")
        pictures = generator.integers(0, 60, (40, 8, 8)).astype(np.uint8)
        for i, picture in enumerate(pictures):
            place = generator.integers(1, 7)
            if i % 2:
                picture[:, place] = 250
            else:
                picture[place] = 250
        return pictures, np.arange(40) % 2

    monkeypatch.setattr(catalogue, "load_images", load)
    return TransferData(dataset="mnist")


@pytest.mark.parametrize("joined", [True, False])
def test_spans_are_learned(questions, tmp_path, joined):
    config = TransferConfig(
        questions,
        Features(dim=16, chars=4),
        GraphOptions(joined=joined),
        Head(hidden=16, dropout=0.0),
        TWO,
        replace(TRAIN, steps=150, batch_size=24, lr=1e-2),
    )
    results = transfer(config, tmp_path / "out")
    assert results["measure"] == "f1"
    assert results["counts"]["training"] == results["counts"]["test"] == 48
    for run in results["runs"]:
        assert run["figures"]["f1"] == run["figures"]["exact_match"] > 0.9
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


@pytest.mark.parametrize("joined", [True, False])
def test_pairs_train(pairs, tmp_path, joined):
    config = TransferConfig(pairs, Features(dim=8, chars=3), GraphOptions(joined=joined), Head(hidden=8), TWO, TRAIN)
    results = transfer(config, tmp_path / "out")
    assert results["measure"] == "accuracy"
    assert {run["graph"] for run in results["runs"]} == {"none", "uniform"}


def test_images_are_learned_and_a_graph_of_pixels_is_transferred(images, tmp_path):
    model = GLoMoConfig(dim=8, layers=2, heads=2, head_dim=4, conv_blocks=1, decoder_layers=1)
    graph = PretrainConfig(PretrainData(dataset=("mnist",), levels=4, side=4), model, replace(TRAIN, steps=2))
    pretrain(graph, tmp_path / "graph")
    assert load_graph(tmp_path / "graph").vocabulary.to_dict() == Pixels(4, 1, 255, 4).to_dict()
    with pytest.raises(UserError, match="cannot read text"):
        load_graph(tmp_path / "graph").vocabulary.encode("a text")
    options = GraphOptions(path=str(tmp_path / "graph"), weights="target")
    config = TransferConfig(images, Features(dim=8), options, Head(hidden=8), Compare(seeds=1), TRAIN)
    results = transfer(config, tmp_path / "out")
    assert [run["graph"] for run in results["runs"]] == ["none", "uniform", "band", "random", "learned"]
    config = replace(
        config, head=Head("conv", 8), compare=Compare(("none",), 1), train=replace(TRAIN, steps=80, lr=1e-2)
    )
    (run,) = transfer(config, tmp_path / "conv")["runs"]
    assert run["figures"]["accuracy"] > 0.9
    with pytest.raises(UserError, match="no word vectors"):
        transfer(replace(config, features=Features("glove-50d")), tmp_path / "glove")


def test_graphs_of_words_and_of_pixels_are_told_apart(images, questions, tmp_path):
    vocabulary = Vocabulary.build(["a b c"], 10)
    with pytest.raises(UserError, match="holds images, but the graph is of words"):
        make_target(TransferConfig(images), vocabulary)
    with pytest.raises(UserError, match="spans of words, but the units of the graph are none"):
        make_target(TransferConfig(questions), own_vocabulary(TransferConfig(images)))


def test_answers_that_are_cut_off_and_those_within_a_word():
    paragraph = "The treaty of 1990s fame was signed in Oslo by all."
    vocabulary = Vocabulary.build([paragraph], 30)
    asked = [("1990", 14), ("signed in Oslo", 29), ("Oslo", 39), ("The", 0), ("all", 47)]
    examples = [SpanExample("Which?", paragraph, ((start, text),)) for text, start in asked]
    found = Questions(examples, vocabulary, 0)
    assert found.answers == [(3, 3), (6, 8), (8, 8), (0, 0), (10, 10)]
    assert [found.text(i, *found.answers[i]) for i in range(5)] == ["1990s", "signed in Oslo", "Oslo", "The", "all"]
    assert found.inexact() == 1
    cut = Questions(examples, vocabulary, 8)  # "in" is the last word left
    assert cut.answers == [(3, 3), None, None, (0, 0), None]
    assert [x.answers[0][1] for x in cut.with_answer().examples] == ["1990", "The"]
    assert len(cut.with_answer().paragraphs) == 2


def test_what_is_held_out_is_whole_articles_and_counts_tell(questions, tmp_path):
    config = TransferConfig(replace(questions, judge="valid", judged=2, length=4))
    target = make_target(config, own_vocabulary(config))
    assert len(target.test) == 2
    articles = [{x.article for x in part.examples} for part in (target.train, target.test)]
    assert not articles[0] & articles[1]
    assert target.counts["left out, their answer is cut off"] == target.counts["training"]  # of the second sentence
    data = json.loads(Path(questions.train).read_text())
    for article in data["data"]:
        del article["paragraphs"][0]["qas"][0]
    (tmp_path / "second.json").write_text(json.dumps(data))
    config = TransferConfig(replace(questions, train=str(tmp_path / "second.json"), length=4))
    with pytest.raises(UserError, match="no answer stands within the first 4 units"):
        make_target(config, own_vocabulary(config))


def test_characters_that_training_lacks_are_counted(questions, monkeypatch):
    monkeypatch.setattr(words_module, "_glove_cache", [({"cat": 0}, np.ones((1, 50), np.float32))])
    config = TransferConfig(questions, Features("glove-50d", chars=2), GraphOptions(), Head(hidden=4), TWO, TRAIN)
    target = make_target(config, own_vocabulary(config))
    trial = target.trial(Setting(config, UniformGraph(), range(10), 0, torch.device("cpu")))
    seen = {
        char
        for i in range(10)
        for text in (target.train.paragraphs[i], target.train.questions[i])
        for char in "".join(text[1])
    }
    names = {word for _, words, _ in target.test.paragraphs for word in words}
    unseen = sum(not set(word) <= seen for word in names)
    assert unseen > 0
    words = len(trial.table.rows)
    assert trial.counts == {
        "words with a character that the training texts lack": unseen,
        "words without a vector": words - 1,  # all but the cat
    }
    loss, count, units = trial.loss([0, 1, 2])
    assert count == 3
    assert units == sum(len(target.train.paragraphs[i][0]) + len(target.train.questions[i][0]) for i in range(3))
    loss.backward()


def test_characters_tell_words_that_training_lacks():
    table = words_module.word_table(Features("learned", 4, chars=2), [["ab"]], [["ba", "zz"]], 0)
    (row,) = table.encode(["ba"])
    assert row > 1
    assert table.characters[row, :2].tolist() == [3, 2]
    assert not table.vectors[row].any()
    assert table.vectors[table.rows["ab"]].all()


def test_the_gradient_of_characters_does_not_depend_on_threads():
    """Two threads that added up each other's words would now and then do so in another order."""
    torch.manual_seed(0)
    words = [f"w{i}" for i in range(50)]
    table = words_module.word_table(Features("random", 4, chars=30), [words], [], 0)
    rows, before = torch.randint(2, 52, (32, 200)), torch.get_num_threads()
    weights = torch.randn(32, 200, 34)
    torch.set_num_threads(2)
    try:
        found = set()
        for _ in range(8):
            torch.manual_seed(1)
            features = words_module.WordFeatures(table, False, 30)
            (features(rows) * weights).sum().backward()
            found.add(features.conv.weight.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head": Head("conv", 8)}, "head.kind is conv; for this task it can be pooling or bigru"),
        ({"judge": "valid"}, "leaves .* to train on and .* to judge by"),
    ],
)
def test_heads_and_divisions_that_cannot_be(pairs, tmp_path, change, sentence):
    small = Path(pairs.train).with_name("small.csv")
    small.write_text("first,second,label\nann,bob,no\nann,ann,yes\n")
    data = replace(pairs, train=str(small), judge=change.pop("judge", "test"))
    config = TransferConfig(data, **change)
    with pytest.raises(UserError, match=sentence):
        make_target(config, own_vocabulary(config))


def test_a_reader_has_no_other_head(questions):
    config = TransferConfig(questions, head=Head("bigru", 8))
    with pytest.raises(UserError, match=r"head.kind is bigru; for this task it can be pooling"):
        make_target(config, own_vocabulary(config))


def test_pixels_of_another_range_are_refused(images):
    config = TransferConfig(replace(images, test_dataset="digits"))
    with pytest.raises(
        UserError, match="the pixels of digits have values up to 16, and the graph is of pixels up to 255"
    ):
        make_target(config, own_vocabulary(config))
    with pytest.raises(UserError, match=r"data.test_dataset would not be read"):
        replace(images, test_dataset="mnist", judge="valid")


def test_a_reader_of_frozen_features_can_be_tuned_in_groups(questions, tmp_path):
    config = TransferConfig(
        questions, Features("random", 8), GraphOptions(), Head(hidden=4), TWO, TRAIN, Tune(factor=2.6)
    )
    transfer(replace(config, compare=Compare(("none",), 1)), tmp_path / "out")
