"""[slices] of `glomo finetune`: the loss, the figures, what is loaded, and what is refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glomo.data import pad, vocabulary_from_dict
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig
from glomo.training import checkpoint
from glomo.training.adapted import Adapters
from glomo.training.config import load_recipe
from glomo.training.distil import Distil
from glomo.training.distributed import World
from glomo.training.documents import FinetuneData
from glomo.training.finetune import finetune, prepare
from glomo.training.finetune_config import ClassifierConfig, FinetuneConfig
from glomo.training.slices import Slices
from glomo.training.tasks import Tasks
from glomo.training.train_config import TrainConfig
from glomo.training.trained_classifier import load_classifier
from glomo.training.tune import Tune
from glomo.training.unlabelled import Unlabelled
from glomo.transfer.signal import SliceHeads

HERE = Path(__file__).parents[2] / "data"
DATA = FinetuneData(str(HERE / "speeches-train.csv"), str(HERE / "speeches-test.csv"), length=20, valid=0.0)
TRAIN = TrainConfig(steps=8, batch_size=16, lr=1e-2, eval_every=0, checkpoint_every=3, progress=0, threads=1)
LSTM = replace(AWDLSTMConfig.preset("tiny", dim=16, hidden=16).scaled(0), activation_reg=0.0, temporal_reg=0.0)
HEAD = ClassifierConfig(hidden=8, chunk=12, window=2, drop_mult=0.0, dropout=0.0, dropout_last=0.0)
ALONE = World(0, 1, torch.device("cpu"))
PATTERNS = ("questions: \\?$", "long ones: ^.{120}", "old: \\b[Tt]h(ou|ee|y)\\b")
MEMBERS = {
    "questions": lambda text: text.endswith("?"),
    "long ones": lambda text: len(text) >= 120,
    "old": lambda text: any(w in ("thou", "thee", "thy", "Thou", "Thee", "Thy") for w in words(text)),
}


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


def words(text):
    return "".join(c if c.isalnum() else " " for c in text).split()


def examples(part):
    with open(HERE / f"speeches-{part}.csv", newline="", encoding="utf-8") as file:
        return [(row["text"].strip(), row["label"]) for row in csv.DictReader(file)]


def config(patterns=PATTERNS, train=TRAIN, classifier=HEAD, **sections):
    return FinetuneConfig(DATA, classifier, lstm=LSTM, train=train, slices=Slices(patterns), **sections)


def test_the_loss_is_that_of_the_labels_and_of_the_slices():
    """CE of the mixture and of the plain features, of each slice's expert and indicator; members by the texts."""
    work = prepare(config(), ALONE)
    model, texts = work.model.train(), examples("train")
    old = [number for number, (text, _) in enumerate(texts) if MEMBERS["old"](text)]
    rows = [*old[:3], 0, 1, 2, 3]
    value, terms, _ = work.task.loss(rows, torch.Generator())
    assert terms == 7
    assert isinstance(model.head, SliceHeads)
    units, lengths, labels = batch(work, [texts[row] for row in rows])
    features, _ = model.pooled(units, lengths)
    marks = torch.tensor([[member(texts[row][0]) for member in MEMBERS.values()] for row in rows])
    experts = [features, *(expert(features) for expert in model.head.experts)]
    said = [model.head.predictor(expert) for expert in experts]
    inside = model.head.indicators(features).sigmoid()
    shares = torch.stack(
        [(q * one.softmax(-1).amax(-1)) for q, one in zip([1.0, *inside.T], said, strict=True)]
    ).softmax(0)
    mixed = sum(share[:, None] * expert for share, expert in zip(shares, experts, strict=True))
    expected = nats(model.head.head(mixed), labels) + nats(said[0], labels)
    for number, one in enumerate(said[1:]):
        mark, sure = marks[:, number], inside[:, number]
        expected = expected - torch.where(mark, sure, 1 - sure).log().mean()
        if mark.any():
            expected = expected + nats(one[mark], labels[mark])
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def batch(work, chosen):
    vocabulary = vocabulary_from_dict(work.task.meta["vocabulary"])
    units, lengths = pad([vocabulary.encode(text)[:20] for text, _ in chosen])
    return units, lengths, torch.tensor([label == "Hamlet" for _, label in chosen]).long()


def nats(logits, labels):
    return -logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean()


def test_figures_of_the_slices(tmp_path):
    """On the test set, by the classifier that is loaded; it needs no marks."""
    results = finetune(config((*PATTERNS, "names: [A-Z]")), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    loaded, test = load_classifier(tmp_path), examples("test")
    right = [said == label for said, (_, label) in zip(loaded.predict([t for t, _ in test]), test, strict=True)]
    assert results["test_accuracy"] == sum(right) / len(test)
    for name, member in MEMBERS.items():
        of = [one for one, (text, _) in zip(right, test, strict=True) if member(text)]
        assert results["slices"][name] == {"examples": len(of), "accuracy": pytest.approx(sum(of) / len(of))}
    assert [results["slices"][name]["examples"] for name in MEMBERS] == [11, 13, 4]
    head = {name.split(".")[1] for name in checkpoint.load(tmp_path / "final").weights if name.startswith("head.")}
    assert head == {"head", "predictor", "experts", "indicators"}


def test_a_slice_without_test_examples(tmp_path):
    assert not any("believed me; for" in text for text, _ in examples("test"))
    results = finetune(config(("virtue: believed me; for",), replace(TRAIN, steps=1)), tmp_path)
    assert results["slices"] == {"virtue": {"examples": 0, "accuracy": None}}


def test_the_head_is_read_once_in_a_step(tmp_path):
    finetune(config(), tmp_path)
    after = checkpoint.load(tmp_path / "final").weights
    assert after["head.head.0.num_batches_tracked"] == TRAIN.steps
    assert after["head.predictor.0.num_batches_tracked"] == TRAIN.steps * (1 + len(PATTERNS))


def test_all_of_it_learns_with_the_head(tmp_path):
    before = prepare(config(tune=Tune(method="top")), ALONE).model.state_dict()
    finetune(config(tune=Tune(method="top"), train=replace(TRAIN, steps=4)), tmp_path)
    after = checkpoint.load(tmp_path / "final").weights
    assert {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])} == {"head"}


def test_beside_other_sections(tmp_path):
    """Unlabelled texts, other tasks, adapters: they go together, and what they make is loaded."""
    (tmp_path / "other.csv").write_text("text,label\n" + "the king,a\nthe queen,b\n" * 30)
    train = replace(TRAIN, checkpoint_every=0)
    for name, sections in {
        "unlabelled": {"unlabelled": Unlabelled("mean-teacher", (str(HERE / "hamlet-act-1.txt"),))},
        "tasks": {"tasks": Tasks(train=(str(tmp_path / "other.csv"),), alpha=0.0)},
        "adapter": {"adapter": Adapters("lora", r=2)},
    }.items():
        results = finetune(config(train=train, **sections), tmp_path / name)
        assert results["slices"]["old"]["examples"] == 4
        loaded = load_classifier(tmp_path / name)
        assert loaded.evaluate(examples("test"))["accuracy"] == results["test_accuracy"]


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        (("a: (",), r"'a: \(', which is no regular expression: missing \)"),
        (("thou",), "'thou'; \"name: regular expression\" is needed"),
        ((": thou",), "': thou'; \"name: regular"),
        (("(?:thou)",), "'\\(\\?:thou\\)'; \"name: regular"),
        (("a: ",), "'a: '; \"name: regular"),
        (("a: x", "a : y"), "two slices called 'a'"),
    ],
)
def test_patterns_that_are_none(patterns, sentence):
    with pytest.raises(UserError, match=sentence):
        Slices(patterns)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"patterns": ("a: the", "b: zzz")}, "has 'b: zzz', and none of the 160 texts to train on is in it"),
        ({"distil": Distil(("run",))}, "distil.teachers is 'run', but slices.patterns have a loss of their own"),
        ({"unlabelled": Unlabelled("domain", ("x",), tsa="log")}, "unlabelled.tsa is 'log', but"),
        ({"classifier": replace(HEAD, smoothing=0.1)}, "classifier.smoothing is 0.1, but"),
    ],
)
def test_mistakes(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        finetune(config(**change), tmp_path / "out")


def test_on_the_command_line():
    options = {"slices.patterns": r"how many: (?i)how (many|much), two words: ^\w+ \w+$"}
    made = load_recipe("finetune-trec", options, FinetuneConfig, "finetune")
    functions = made.slices.functions()
    assert [function("How much ?") for function in functions.values()] == [True, False]
    assert [function("Answer this") for function in functions.values()] == [False, True]
