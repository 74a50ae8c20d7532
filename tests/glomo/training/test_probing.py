"""Probing trained runs: whose features are read, which texts are labelled how, and what is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glomo.data import Vocabulary, read_labelled
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.training import checkpoint
from glomo.training.documents import FinetuneData
from glomo.training.finetune import finetune
from glomo.training.finetune_config import ClassifierConfig, FinetuneConfig
from glomo.training.models import model_meta
from glomo.training.probing import ProbeOptions, labelled_texts, load_model, probe_run, text_features
from glomo.training.train_config import TrainConfig

HERE = Path(__file__).parents[2] / "data"
HAMLET, TRAIN = str(HERE / "hamlet-act-1.txt"), str(HERE / "speeches-train.csv")
VOCABULARY = Vocabulary.build([text for text, _ in read_labelled(TRAIN)], 400)
LSTM = AWDLSTMConfig.preset("tiny", dim=12, hidden=8, vocab_size=len(VOCABULARY))
TRANSFORMER = TransformerConfig.preset("tiny", dim=12, ff=16, max_length=48, norm="pre", vocab_size=len(VOCABULARY))


def any_text(text):
    return True


def saved(folder, kind, backward=False):
    """A run's folder with a language model of random weights."""
    torch.manual_seed(0)
    model = LSTMLanguageModel(LSTM) if kind == "lstm" else LanguageModel(TRANSFORMER)
    config = {"method": {"model": kind, "backward": backward}, "data": {"length": 24}}
    meta = model_meta("language-model", model.config.to_dict(), VOCABULARY, config)
    checkpoint.save(folder / "final", model.state_dict(), {}, meta)
    return model.eval()


@pytest.mark.parametrize(("kind", "backward"), [("lstm", False), ("transformer", True)])
@pytest.mark.parametrize("pool", ["mean", "last", "max"])
def test_features_text_by_text(kind, backward, pool, tmp_path):
    model = saved(tmp_path, kind, backward)
    loaded, vocabulary, found_backward, longest = load_model(tmp_path)
    assert found_backward == backward
    assert longest > 40
    texts = ["Words, words, words.", "What is the matter, my lord?", "", "Between who?"]
    found = text_features(loaded, vocabulary, backward, texts, 5, pool)
    assert list(found) == ["embeddings", "layer 1", "layer 2"]
    for number, text in enumerate(texts):
        ids = VOCABULARY.encode(text)[:5] or [1]
        units = torch.tensor([ids[::-1] if backward else ids])
        layers = list(model.encoder(units).layers) if kind == "lstm" else model.layers(units)
        if kind == "transformer":
            del layers[-1]  # behind the last norm, which is no layer's
        for name, layer in zip(found, layers, strict=False):
            x = layer[0].detach()
            expected = {"mean": x.mean(0), "last": x[-1], "max": x.max(0).values}[pool]
            torch.testing.assert_close(found[name][number], expected)


def test_a_classifier(tmp_path):
    data = FinetuneData(TRAIN, str(HERE / "speeches-test.csv"), length=20)
    train = TrainConfig(steps=1, batch_size=8, eval_every=0, progress=0, device="cpu", threads=1)
    config = FinetuneConfig(data, ClassifierConfig(hidden=4, chunk=12), lstm=replace(LSTM, vocab_size=60), train=train)
    finetune(config, tmp_path / "run")
    found = probe_run(tmp_path / "run", ProbeOptions(TRAIN, limit=60, kind="linear"), tmp_path / "out")
    assert [row["layer"] for row in found["probes"]] == ["embeddings", "layer 1", "layer 2"]  # of different widths
    assert found["classes"] == sorted({label for _, label in read_labelled(TRAIN)})


def test_results(tmp_path):
    saved(tmp_path / "run", "transformer")
    options = ProbeOptions("length", text=HAMLET, limit=300)
    found = probe_run(tmp_path / "run", options, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_bytes()) == json.loads(json.dumps(found))
    assert [(row["kind"], row["layer"]) for row in found["probes"]] == [
        (kind, layer) for kind in ("linear", "mlp") for layer in ("embeddings", "layer 1", "layer 2", "mix")
    ]
    for row in found["probes"]:
        assert row["selectivity"] == pytest.approx(row["accuracy"] - row["control"])
        assert sum(row["examples"]) == found["texts"]
    assert found["task"] == "length"
    assert found["pool"] == "mean"
    assert "dataset" not in found
    assert probe_run(tmp_path / "run", options, tmp_path / "again") == found


def test_surface_tasks_are_made_of_texts_that_fit():
    lines = [line.strip() for line in Path(HAMLET).read_text(encoding="utf-8").splitlines() if line.strip()]

    def fits(text):
        return len(VOCABULARY.encode(text)) <= 8

    for task in ("length", "shift", "content"):
        found = labelled_texts(ProbeOptions(task, text=HAMLET, first_rank=30, per_word=4, words=9), fits)
        assert all(len(VOCABULARY.encode(text)) <= 8 for text in found.texts)
        assert found.left_out == len(lines) - len(found.texts) > 0
    inverted = [text for text, label in zip(found.texts, found.labels, strict=True) if label == 1]
    assert inverted
    shift = labelled_texts(ProbeOptions("shift", text=HAMLET), any_text)
    # marks are tokens of their own: a mark that moves along with its word would tell
    assert all(token[-1] not in ",.;:?!" or len(token) == 1 for text in shift.texts for token in text.split())


def test_labelled_files_and_their_limit():
    examples = read_labelled(TRAIN)
    found = labelled_texts(ProbeOptions(TRAIN), any_text)
    assert found.texts == [text for text, _ in examples]
    assert [found.classes[label] for label in found.labels] == [label for _, label in examples]
    some = labelled_texts(ProbeOptions(TRAIN, limit=50), any_text)
    assert len(some.texts) == 50
    assert [text for text in found.texts if text in some.texts] == some.texts
    other = labelled_texts(ProbeOptions(TRAIN, limit=50, seed=1), any_text)
    assert other.texts != some.texts
    assert some.left_out == len(examples) - len(some.texts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(task="length"), "--text FILE or --dataset NAME is needed"),
        (dict(task="label"), "--dataset NAME is needed"),
        (dict(task="length", text="a", dataset="b"), "given twice"),
        (dict(task="x.csv", text="a"), "the texts are those of x.csv"),
        (dict(task="x.csv", limit=0), "--limit is 0"),
        (dict(task="x.csv", seed=-1), "--seed is -1"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(UserError, match=words):
        ProbeOptions(**options)


def test_what_is_refused(tmp_path):
    saved(tmp_path / "run", "lstm")
    for options, words in (
        (ProbeOptions("content", text=HAMLET), "content: .* words have 120 sentences to themselves"),
        (ProbeOptions(str(tmp_path / "no.csv")), "does not exist"),
        (ProbeOptions(TRAIN, limit=2), "at least"),
    ):
        with pytest.raises(UserError, match=words):
            probe_run(tmp_path / "run", options, tmp_path / "out")
    for folder in ("nowhere", ""):
        with pytest.raises(UserError, match="checkpoint"):
            probe_run(tmp_path / folder, ProbeOptions(TRAIN), tmp_path / "out")
