"""LSTM language models from text to perplexity: states carried along, vocabularies carried over, both directions."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glomo.cli.main import main
from glomo.data import read_texts
from glomo.data.streams import StreamBatches
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.training import checkpoint
from glomo.training.language import (
    VALID_ROWS,
    VALID_SHARE,
    LanguageConfig,
    LanguageData,
    LanguageMethod,
    make_model,
    running_units,
    stream_likelihood,
    train_language_model,
)
from glomo.training.language_model import load_language_model
from glomo.training.train_config import TrainConfig
from glomo.training.tune import Tune

TEXT = (Path(__file__).parents[2] / "data" / "hamlet-act-1.txt").read_text()
DRY = AWDLSTMConfig.preset("tiny", dim=12, hidden=16).scaled(0)
TRAIN = TrainConfig(
    steps=6, batch_size=4, lr=1e-2, eval_every=3, checkpoint_every=2, progress=0, device="cpu", threads=1
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "hamlet.txt"
    path.write_text(TEXT[:12_000])
    return path


def config(text, lstm=DRY, train=TRAIN, tune=None, data=None, **method):
    options = {"vocabulary": "words", "vocab_size": 300, "length": 10, **(data or {})}
    return LanguageConfig(
        LanguageData((str(text),), **options),
        LanguageMethod("lstm", **method),
        lstm=lstm,
        tune=tune or Tune(),
        train=train,
    )


def rows_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize(("rows", "length"), [(1, 7), (1, 100), (3, 5)])
def test_the_likelihood_carries_its_state(rows, length):
    """Whatever the windows: as if each row were read in one piece."""
    torch.manual_seed(0)
    model = LSTMLanguageModel(replace(DRY, vocab_size=30)).double().eval()
    units = torch.randint(1, 31, (35,))
    nats, count = stream_likelihood(model, units, rows, length)
    columns = 34 // rows
    expected = 0.0
    for row in range(rows):
        part = units[row * columns : (row + 1) * columns + 1]
        scores = model.logits(model.encoder(part[None, :-1]).raw[0]).log_softmax(-1)
        expected -= float(scores.gather(1, part[1:, None]).sum().detach())
    assert count == rows * columns
    assert nats == pytest.approx(expected)


@pytest.mark.parametrize("jitter", [True, False])
def test_training_carries_its_state_too(text, tmp_path, jitter):
    """At a rate of 0 the losses of an epoch are those of the streams read in one piece."""
    still = replace(TRAIN, lr=0.0, steps=40, eval_every=0, checkpoint_every=7)
    lstm = replace(DRY, activation_reg=0.0, temporal_reg=0.0)
    train_language_model(config(text, lstm, still, jitter=jitter), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    trained = load_language_model(tmp_path / "out" / "final")
    texts = [line.strip() for line in TEXT[:12_000].split("\n") if line.strip()]
    units = running_units(texts, trained.vocabulary, trained.model.end)
    units = units[: len(units) - int(VALID_SHARE * len(units))]
    batches = StreamBatches(len(units) - 1, 4, 10, 0, jitter)
    nats = torch.zeros(4, batches.columns)
    for row in range(4):
        part = units[row * batches.columns : (row + 1) * batches.columns + 1].long()
        with torch.no_grad():
            scores = trained.model.logits(trained.model.encoder(part[None, :-1]).raw[0]).log_softmax(-1)
        nats[row] = -scores.gather(1, part[1:, None])[:, 0]
    for row in rows[: min(40, len(batches))]:
        start, columns = batches.window(row["step"] - 1)
        assert row["loss"] == pytest.approx(float(nats[:, start : start + columns].mean()), abs=2e-5)
        assert row["units"] == 4 * columns


@pytest.mark.parametrize("optimizer", ["adamw", "nt-asgd"])
def test_a_longer_run_is_the_same_run(text, tmp_path, optimizer):
    """State, moments and averages go on to the last bit: 5 steps and then 10 more, or 15 at once."""
    train = replace(TRAIN, optimizer=optimizer, lr=0.5 if optimizer == "nt-asgd" else 1e-2, eval_every=1, nonmono=2)
    wet = AWDLSTMConfig.preset("tiny", dim=12, hidden=16)
    for steps in (5, 15):
        train_language_model(config(text, wet, replace(train, steps=steps)), tmp_path / "twice")
    train_language_model(config(text, wet, replace(train, steps=15)), tmp_path / "once")
    assert rows_of(tmp_path / "twice") == rows_of(tmp_path / "once")
    for part in ("best", "final"):
        a, b = (checkpoint.load(tmp_path / name / part).weights for name in ("twice", "once"))
        assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_nt_asgd_keeps_the_mean(text, tmp_path):
    """Too high a rate: validation stops falling, averaging begins, and final/ is the mean of the weights since then."""
    train = replace(
        TRAIN, optimizer="nt-asgd", lr=30.0, clip=0.25, steps=24, eval_every=1, nonmono=2, checkpoint_every=1, keep=99
    )
    train_language_model(config(text, train=train), tmp_path / "out")
    losses = [row["valid_loss"] for row in rows_of(tmp_path / "out")]
    begun = next(t for t in range(4, 25) if losses[t - 1] > min(losses[: t - 3]))  # after step t, as published
    steps = [checkpoint.load(folder).weights for folder in checkpoint.step_folders(tmp_path / "out" / "checkpoints")]
    mean = torch.stack([weights["decoder.bias"] for weights in steps[begun:]]).mean(0)
    torch.testing.assert_close(checkpoint.load(tmp_path / "out" / "final").weights["decoder.bias"], mean)


def test_results_are_of_the_weights_that_are_kept(text, tmp_path):
    """The last stage of chain-thaw goes back to its best weights behind the last row of the metrics."""
    held = tmp_path / "held.txt"
    held.write_text(TEXT[12_000:16_000])
    train, tune = replace(TRAIN, steps=30, lr=0.5, eval_every=2), Tune(method="chain-thaw", patience=2, lower_lr=0.3)
    made = config(text, train=train, tune=tune, data={"valid": str(held), "valid_units": 400})
    last = train_language_model(made, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_bytes())
    found = load_language_model(tmp_path / "out" / "final")
    units = running_units(read_texts(held), found.vocabulary, found.model.end)[:401]
    nats, count = stream_likelihood(found.model, units, VALID_ROWS, 10)
    assert results["valid_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert results["valid_loss"] < last["valid_loss"] - 1e-3
    assert (results["step"], results["budget"]) == (last["step"], 30)


def test_from_another_model(text, tmp_path, capsys):
    """Rows of units that both have are carried over, a new unit's is the mean; groups thaw one after the other."""
    train_language_model(config(text), tmp_path / "general")
    target = tmp_path / "target.txt"
    target.write_text("Horatio likes zzz and the king\n" * 40)
    tune = Tune(str(tmp_path / "general"), "gradual-unfreeze", 2.6, stage_steps=1)
    moved = config(target, train=replace(TRAIN, lr=0.0), tune=tune)
    train_language_model(moved, tmp_path / "target")
    old, new = (load_language_model(tmp_path / name) for name in ("general", "target"))
    words = old.vocabulary.units(), new.vocabulary.units()
    assert "zzz" in words[1]
    assert "zzz" not in words[0]
    for of in (lambda m: m.encoder.embedding.weight, lambda m: m.decoder.bias):
        before, after = of(old.model).detach(), of(new.model).detach()
        assert torch.equal(after[words[1].index("king")], before[words[0].index("king")])
        assert torch.equal(after[-1], before[-1])  # what starts and ends texts
        torch.testing.assert_close(after[words[1].index("zzz")], before[1:].mean(0))
    name = "encoder.layers.0.weight_hh_l0"
    assert torch.equal(old.model.state_dict()[name], new.model.state_dict()[name])
    stages = [row["stage"] for row in rows_of(tmp_path / "target")]
    assert stages == ["last", "last 2", "last 3", "all", "all", "all"]

    same = config(target, tune=Tune(str(tmp_path / "general")), data={"vocabulary": "init"})
    model, vocabulary = make_model(same, ["zzz"])
    assert vocabulary.fingerprint == old.vocabulary.fingerprint
    assert all(torch.equal(value, old.model.state_dict()[n]) for n, value in model.state_dict().items())


def test_sizes_come_from_the_model_and_dropouts_from_the_recipe(text, tmp_path):
    train_language_model(config(text), tmp_path / "general")
    other = AWDLSTMConfig.preset("ulmfit")
    model, _ = make_model(config(text, other, tune=Tune(str(tmp_path / "general")), drop_mult=0.5), [TEXT])
    found = model.config
    assert (found.dim, found.hidden, found.layers) == (12, 16, 2)
    assert (found.dropout_input, found.weight_drop) == (0.125, 0.1)


def test_backward(text, tmp_path, capsys):
    """The text read from its end: figures, and text before the prompt."""
    train_language_model(config(text, backward=True), tmp_path / "back")
    model = load_language_model(tmp_path / "back")
    assert model.backward
    found = model.perplexity(["To be or not"])
    units = [model.model.end, *model.vocabulary.encode("To be or not"), model.model.end]
    model.backward = False
    reversed_text = model.vocabulary.decode(units[1:-1][::-1])
    assert model.perplexity([reversed_text])["perplexity"] == pytest.approx(found["perplexity"])
    assert main(["lm", "run", str(tmp_path / "back"), "to be", "--units", "5"]) == 0
    assert capsys.readouterr().out.strip().endswith("to be")
    assert main(["lm", "eval", str(tmp_path / "back"), "--text", str(text)]) == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"backward": True}, "forward lstm language model; method.model and method.backward say backward lstm"),
        ({"tune": Tune(), "data": {"vocabulary": "init"}}, "data.vocabulary is 'init', .* but tune.init is empty"),
        ({"rates": (1.0,)}, "tune.rates has 1 rates; there are 4 layer groups: embedding, layer.0, layer.1, decoder"),
        ({"lstm": replace(DRY, hidden=24)}, r"lstm.hidden is 24, but 16 in the language model of .*general; leave"),
        ({"train": replace(TRAIN, batch_size=5000)}, "units to predict, too few for 5000 rows"),
    ],
)
def test_mistakes(text, tmp_path, change, sentence):
    train_language_model(config(text), tmp_path / "general")
    options = {"tune": Tune(str(tmp_path / "general"), rates=change.pop("rates", ())), **change}
    with pytest.raises(UserError, match=sentence):
        train_language_model(config(text, **options), tmp_path / "out")


def test_a_transformer_is_no_lstm(text, tmp_path):
    train_language_model(config(text), tmp_path / "general")
    other = replace(config(text, tune=Tune(str(tmp_path / "general"))), method=LanguageMethod("transformer"))
    with pytest.raises(UserError, match=r"holds a forward lstm language model; .* say forward transformer"):
        train_language_model(other, tmp_path / "out")


def test_it_learns(text, tmp_path):
    """Better than the units' frequencies after a minute's worth of steps on a text that repeats itself."""
    line = "the red cat sees a blue dog and the blue dog sees a red cat"
    path = tmp_path / "cat.txt"
    path.write_text((line + "\n") * 60)
    train = replace(TRAIN, steps=60, lr=2e-2, batch_size=8, eval_every=0)
    train_language_model(config(path, train=train), tmp_path / "out")
    counts = [line.split().count(word) for word in set(line.split())]
    entropy = sum(-n / len(line.split()) * math.log(n / len(line.split())) for n in counts)
    assert math.log(load_language_model(tmp_path / "out").perplexity([line] * 5)["perplexity"]) < 0.5 * entropy
    assert rows_of(tmp_path / "out")[0]["loss"] > entropy
