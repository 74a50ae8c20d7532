"""Language models from text to perplexity: on text that repeats itself, and beside sums written out."""

import json
import math

import pytest
import torch

from glomo.cli.main import main
from glomo.data import Vocabulary, catalogue
from glomo.errors import UserError
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.training import checkpoint
from glomo.training.config import build
from glomo.training.language import (
    LanguageConfig,
    LanguageData,
    load_texts,
    negative_log_likelihood,
    running_units,
    train_language_model,
    windows,
)
from glomo.training.language_model import TrainedLanguageModel, load_language_model

LINE = "the red cat sees a blue dog and the blue dog sees a red cat"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text((LINE + "\n") * 120)
    return path


def recipe(text, **sections):
    values = {
        "data": {"text": (str(text),), "vocabulary": "words", "length": 16},
        "model": {"preset": "tiny", "dim": 32, "ff": 64, "max_length": 64, "dropout": 0.0},
        "train": {
            "steps": 4,
            "batch_size": 8,
            "lr": 5e-3,
            "warmup": 2,
            "checkpoint_every": 2,
            "eval_every": 2,
            "progress": 0.0,
        },
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build(LanguageConfig, values, "a test")


def make(**options):
    torch.manual_seed(0)
    return LanguageModel(TransformerConfig.preset("tiny", vocab_size=20, max_length=16, **options)).double().eval()


def test_windows_hold_every_unit_once():
    units = torch.arange(2, 13)
    inputs, outputs = windows(units, range(0, 10, 4), 4)
    assert inputs.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 0, 0]]
    assert outputs.tolist() == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 0, 0]]


@pytest.mark.parametrize("count", [2, 5, 8, 9, 23])
@pytest.mark.parametrize("stride", [1, 3, 5, 8])
def test_the_likelihood_is_the_sum_over_units(count, stride):
    """Every unit once, each from the units of the first window that holds it."""
    model, length = make(), 8
    units = torch.randint(1, 20, (count,), dtype=torch.int32)
    expected, end = 0.0, 0
    for unit in range(1, count):
        if unit > end:  # the next window: it ends `stride` units later, or is the first
            end = length if not end else end + stride
        start = end - length
        before = units[None, start:unit].long()
        expected -= float(model.logits(model.hidden(before))[0, -1].log_softmax(-1)[units[unit]])
    found, terms = negative_log_likelihood(model, units, length, stride, batch=2)
    assert terms == count - 1
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_model_that_knows_nothing():
    """It is as perplexed as there are units: the words, the unknown one and the end."""
    vocabulary = Vocabulary(["a", "b", "c"])
    model = LanguageModel(TransformerConfig.preset("tiny", vocab_size=len(vocabulary), max_length=16))
    torch.nn.init.zeros_(model.embedding.weight)
    figures = TrainedLanguageModel(model, vocabulary, 16, 8).perplexity(["a b c a", "b"])
    assert figures["perplexity"] == pytest.approx(5, abs=1e-3)
    assert (figures["units"], figures["words"]) == (7, 7)
    assert figures["perplexity_word"] == figures["perplexity"]
    assert "bits_per_byte" not in figures


def test_text_almost_without_white_space_has_no_perplexity_a_word():
    model = LanguageModel(TransformerConfig.preset("tiny", vocab_size=3, max_length=16))
    assert (
        TrainedLanguageModel(model, Vocabulary(["a"]), 16, 16).perplexity(["a!" * 900])["perplexity_word"] == math.inf
    )


def test_learned_positions_are_read_as_far_as_they_were_trained(text, tmp_path):
    train_language_model(recipe(text, model={"positions": "learned"}, data={"length": 8}), tmp_path / "run")
    with pytest.raises(UserError, match="2 units of prompt and 7 more are too many; the model takes 8"):
        load_language_model(tmp_path / "run").generate("the red", units=7)
    assert load_language_model(tmp_path / "run").generate("the red", units=6)


def test_a_data_sets_own_text_for_validation(monkeypatch):
    monkeypatch.setattr(catalogue, "load_texts", lambda name, split="train": [f"{name} {split}"])
    assert load_texts(LanguageData(dataset="wikitext-2")) == (["wikitext-2 train"], ["wikitext-2 valid"])
    assert load_texts(LanguageData(dataset="squad-paragraphs")) == (["squad-paragraphs train"], [])


def test_learns_and_is_found_again(text, tmp_path):
    config = recipe(text, train={"steps": 120}, data={"vocabulary": "subwords", "vocab_size": 300})
    row = train_language_model(config, tmp_path / "run")
    model = load_language_model(tmp_path / "run")
    figures = model.perplexity([LINE])
    assert row["valid_loss"] < 0.1
    assert figures["perplexity"] < 1.2
    nats = figures["units"] * math.log(figures["perplexity"])
    assert figures["perplexity_word"] == pytest.approx(math.exp(nats / 15), rel=1e-2)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(LINE) + 1), abs=1e-3)
    assert model.generate("the red cat", units=40, top_k=1) == LINE
    assert model.generate("", units=40, top_k=1) == LINE


def test_texts_end(text):
    vocabulary = Vocabulary(["a", "b"])
    assert running_units(["a b", "", "b"], vocabulary, 9).tolist() == [9, 2, 3, 9, 9, 3, 9]


def test_a_run_that_stops_goes_on_to_the_same_bits(text, tmp_path):
    train_language_model(recipe(text), tmp_path / "whole")
    train_language_model(recipe(text, train={"steps": 2}), tmp_path / "parts")
    train_language_model(recipe(text), tmp_path / "parts")
    ours, theirs = (checkpoint.load(tmp_path / name / "final").weights for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_text_of_ones_own_for_validation(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("a red dog\n")
    row = train_language_model(recipe(text, data={"valid": str(other)}), tmp_path / "run")
    model = load_language_model(tmp_path / "run" / "final")
    assert math.exp(row["valid_loss"]) == pytest.approx(model.perplexity(["a red dog"])["perplexity"], rel=1e-4)
    text.write_text("now another text\n" * 30)
    with pytest.raises(UserError, match="with another vocabulary"):  # the same folder
        train_language_model(recipe(text, train={"steps": 6}, data={"valid": str(other)}), tmp_path / "run")


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (dict(data={"text": ()}), "names no text"),
        (dict(train={"batch_tokens": 100}), "train.batch_tokens is for sentence pairs"),
        (dict(data={"length": 65}), "data.length is 65; model.max_length, which is 64, is less"),
    ],
)
def test_what_cannot_be_trained(text, tmp_path, sections, sentence):
    with pytest.raises(UserError, match=sentence):
        train_language_model(recipe(text, **sections), tmp_path / "run")


def test_the_command_line(text, tmp_path, capsys):
    run = tmp_path / "run"
    train_language_model(recipe(text), run)
    assert main(["lm", "eval", str(run), "--text", str(text), "--stride", "16"]) == 0
    figures = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(figures["perplexity"]) > 1
    assert main(["lm", "run", str(run), "the red", "--units", "5", "--top-k", "2"]) == 0
    assert capsys.readouterr().out.startswith("the red")
    for arguments, sentence in (
        (["eval", str(run)], "--text FILE or --dataset NAME"),
        (["eval", str(run), "--text", str(text), "--stride", "17"], "the stride is 17; it must be from 1 to 16"),
        (["run", str(run), "a", "b"], "a folder and at most one prompt are needed, but 3 words are given"),
        (["run", str(run), "--units", "70"], "0 units of prompt and 70 more are too many; the model takes 64"),
        (["run", str(run), "--temperature", "0"], "temperature is 0.0"),
        (["run", str(run), "--units", "-1"], "units is -1"),
        (["run", str(run), "--seed", str(2**70)], "a number of 64 bits"),
        (["eval", str(run), "--text", str(text), "--split", "test"], "--split goes with --dataset"),
        (["train"], "`glomo lm train` needs one recipe"),
        (["runn", str(run)], "no command lm 'runn'"),
    ):
        assert main(["lm", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert json.loads((run / "best" / "meta.json").read_text())["kind"] == "language-model"
