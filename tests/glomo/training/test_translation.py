"""Translation from pairs to BLEU, on a language of nine words."""

import json
import random

import pytest
import torch

from glomo.cli.main import main
from glomo.errors import UserError
from glomo.training import checkpoint
from glomo.training.config import build
from glomo.training.models import load_language_weights
from glomo.training.translation import TranslationConfig, load_pairs, train_translation, validation_loss
from glomo.training.translator import load_translator

ON_CPU = torch.device("cpu")
WORDS = {
    "one": "uno",
    "two": "dos",
    "three": "tres",
    "four": "cuatro",
    "red": "rojo",
    "blue": "azul",
    "cat": "gato",
    "dog": "perro",
    "tree": "arbol",
}


@pytest.fixture
def pairs(tmp_path):
    """A file of pairs, word by word in reverse order."""
    choose = random.Random(0)
    lines = ["source\ttarget"]
    for _ in range(400):
        words = choose.choices(list(WORDS), k=choose.randint(1, 4))
        lines.append(f"{' '.join(words)}\t{' '.join(WORDS[word] for word in reversed(words))}")
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe(pairs, **sections):
    values = {
        "data": {"pairs": (str(pairs),), "vocab_size": 340, "max_length": 20},
        "model": {"preset": "tiny", "dim": 32, "ff": 64, "max_length": 32, "dropout": 0.0},
        "rnn": {"dim": 32, "dropout": 0.0},
        "train": {
            "steps": 6,
            "batch_tokens": 200,
            "lr": 5e-3,
            "checkpoint_every": 2,
            "eval_every": 3,
            "progress": 0.0,
            "keep": 3,
        },
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build(TranslationConfig, values, "a test")


@pytest.mark.parametrize("model", ["transformer", "rnn-attention"])
def test_learns_and_is_found_again(pairs, tmp_path, model):
    steps = 220 if model == "transformer" else 150
    config = recipe(pairs, method={"model": model, "average": 2}, train={"steps": steps, "checkpoint_every": 20})
    row = train_translation(config, tmp_path / "run")
    assert row["valid_loss"] < 1.0
    translator = load_translator(tmp_path / "run")
    _, held = load_pairs(config.data)
    figures, found = translator.evaluate(held)
    assert figures["bleu"] > 60
    assert len(found) == len(held)
    sentences = ["one cat", "", "blue blue tree"]
    together = translator.translate(sentences)
    assert together == [translator.translate([sentence])[0] for sentence in sentences]
    assert together[1] == ""


def test_without_attention_it_runs(pairs, tmp_path):
    train_translation(recipe(pairs, method={"model": "rnn"}), tmp_path / "run")
    assert len(load_translator(tmp_path / "run").translate(["one cat", "dog"])) == 2


def test_the_result_is_the_mean_of_the_newest_checkpoints(pairs, tmp_path):
    train_translation(recipe(pairs, method={"average": 2}), tmp_path / "run")
    newest = [checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-{n:06}").weights for n in (4, 6)]
    found = checkpoint.load(tmp_path / "run" / "final").weights
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (newest[0][name] + newest[1][name]) / 2)
    other = tmp_path / "other"
    checkpoint.save(other, {"a": torch.zeros(2)}, None, {})
    with pytest.raises(UserError, match="different models"):
        checkpoint.average([other, tmp_path / "run" / "final"])


def test_results_are_of_the_weights_that_are_kept(pairs, tmp_path):
    config = recipe(pairs, method={"average": 2}, train={"steps": 12})
    for _ in range(2):
        last = train_translation(config, tmp_path / "run")
        results = json.loads((tmp_path / "run" / "results.json").read_bytes())
        found = load_translator(tmp_path / "run")
        _, held = load_pairs(config.data)
        loss = validation_loss(found.model, [tuple(map(found.vocabulary.encode, pair)) for pair in held], ON_CPU)
        assert results["valid_loss"] == pytest.approx(loss, rel=1e-5)
        assert results["valid_loss"] != pytest.approx(last["valid_loss"], rel=1e-3)
        assert results["memory"] is None or results["memory"] >= 0
        (tmp_path / "run" / "results.json").write_bytes(json.dumps({**results, "memory": 77}).encode())
    train_translation(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_bytes())["memory"] == 77
    (tmp_path / "run" / "results.json").unlink()
    train_translation(config, tmp_path / "run")  # which does nothing, and so takes no memory
    assert json.loads((tmp_path / "run" / "results.json").read_bytes())["memory"] is None


def test_no_weights_of_no_model(pairs):
    with pytest.raises(
        UserError, match=r"init\.weights is false, which takes the vocabulary of init.model alone; that is"
    ):
        recipe(pairs, init={"weights": False})


def test_a_run_that_stops_goes_on_to_the_same_bits(pairs, tmp_path):
    def rows(folder):
        return [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]

    train_translation(recipe(pairs), tmp_path / "whole")
    train_translation(recipe(pairs, train={"steps": 4}), tmp_path / "parts")
    train_translation(recipe(pairs), tmp_path / "parts")
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    assert [{**row, "valid_loss": 0} for row in whole] == [{**row, "valid_loss": 0} for row in parts]
    ours, theirs = (checkpoint.load(tmp_path / name / "final").weights for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def language_models(pairs, tmp_path):
    """{name: run folder} of small language models of both languages."""
    small = ["--data.text", str(pairs), "--data.column", "target", "--data.vocab_size", "330", "--data.length", "16"]
    small += ["--train.steps", "2", "--train.progress", "0", "--train.precision", "fp32", "--train.threads", "1"]
    sizes = ["--model.dim", "32", "--model.ff", "64", "--model.heads", "2", "--model.layers", "2"]
    more = {"fitting": [], "words": ["--data.vocabulary", "words"], "backward": ["--method.backward"]}
    for name, options in more.items():
        out = ["--out", str(tmp_path / name), "--model.norm", "post", "--train.warmup", "1"]
        assert main(["lm", "train", "lm-small", *small, *sizes, *options, *out]) == 0
    return {name: str(tmp_path / name) for name in more}


def test_from_a_language_model(pairs, tmp_path, language_models):
    """Its vocabulary, and its weights wherever there is a place for them; what it lacks is new."""
    still = {"train": {"lr": 0.0, "steps": 1}, "init": {"model": language_models["fitting"]}}
    train_translation(recipe(pairs, **still), tmp_path / "run")
    before = load_language_weights(language_models["fitting"])
    assert load_translator(tmp_path / "run").vocabulary.fingerprint == before.vocabulary.fingerprint
    after = checkpoint.load(tmp_path / "run" / "final").weights
    assert torch.equal(after["embedding.weight"], before.weights["embedding.weight"])
    for name, value in before.weights.items():
        if name.startswith("decoder."):
            assert torch.equal(after[name.replace("decoder.", "encoder.")], value), name
            assert torch.equal(after[name.replace(".norms.1.", ".norms.2.")], value), name
    without = {**still, "init": {**still["init"], "weights": False}}
    train_translation(recipe(pairs, **without), tmp_path / "plain")
    assert load_translator(tmp_path / "plain").vocabulary.fingerprint == before.vocabulary.fingerprint
    new = checkpoint.load(tmp_path / "plain" / "final").weights
    assert not torch.equal(new["embedding.weight"], before.weights["embedding.weight"])
    over = [name for name in new if ".over_memory." in name]
    assert over
    assert all(after[name].shape == new[name].shape and after[name].any() for name in over if "weight" in name)


def test_what_starts_no_translator(pairs, tmp_path, language_models):
    for name, sections, sentence in (
        ("fitting", {"model": {"dim": 16}}, r"does not fit \[model\]: dim of the Transformer is 16, .* model 32"),
        ("fitting", {"method": {"model": "rnn"}}, "of the kind transformer, and method.model 'rnn'; a Transformer"),
        ("words", {}, "whose vocabulary is of words; one of subwords is needed"),
        ("backward", {}, "which reads backward; a translator writes forward"),
    ):
        with pytest.raises(UserError, match=sentence):
            train_translation(recipe(pairs, init={"model": language_models[name]}, **sections), tmp_path / "out")


def test_sources_of_validation_are_not_trained_on(pairs):
    train, held = load_pairs(recipe(pairs).data)
    assert len(train) + len(held) == 400
    assert held
    assert not {a for a, _ in train} & {a for a, _ in held}
    swapped, _ = load_pairs(recipe(pairs, data={"swap": True}).data)
    assert swapped == [(b, a) for a, b in train]


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (dict(data={"pairs": ()}), "names no pairs"),
        (dict(data={"max_length": 1, "vocab_size": 258}), "no training pair has at most data.max_length = 1"),
        (dict(data={"max_length": 32}), "model.max_length is 32; it must be above data.max_length"),
        (dict(train={"batch_tokens": 3}), "a larger train.batch_tokens"),
        (dict(method={"average": 4}), "train.keep keeps only 3"),
        (dict(model={"encoder_attention": ("graph",)}), "no graph"),
    ],
)
def test_what_cannot_be_trained(pairs, tmp_path, sections, sentence):
    with pytest.raises(UserError, match=sentence):
        train_translation(recipe(pairs, **sections), tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "key", "value"), [("method", "beam", 0), ("train", "beta2", 1.0), ("data", "max_length", 0)]
)
def test_values_out_of_range(pairs, section, key, value):
    with pytest.raises(UserError, match=f"{section}.{key}"):
        recipe(pairs, **{section: {key: value}})


def test_the_command_line(pairs, tmp_path, capsys):
    run = tmp_path / "run"
    train_translation(recipe(pairs), run)
    kept = tmp_path / "found.jsonl"
    judged = ["eval", str(run), "--pairs", str(pairs), "--limit", "10", "--beam", "1", "--out", str(kept)]
    assert main(["translate", *judged]) == 0
    printed = capsys.readouterr().out
    assert "bleu" in printed
    assert "signature" in printed
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 10
    assert set(rows[0]) == {"source", "target", "found"}
    text = tmp_path / "text.txt"
    text.write_text("one cat\nblue tree\n")
    assert main(["translate", "run", str(run), str(text)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2

    for arguments, sentence in (
        (["run"], "a folder and at most one file are needed, but 0 words are given: none"),
        (["run", str(tmp_path / "none")], "there is no checkpoint folder"),
        (["run", str(run), str(text), "--beam", "0"], "method.beam is 0"),
        (["run", str(run), str(text), "--beam", "x"], "--beam is 'x'"),
        (["run", str(run), str(text), "--beem", "3"], "unknown option --beem; the nearest known one is --beam"),
        (["eval", str(run)], "--pairs FILE or --dataset NAME"),
        (["judge", str(run)], "no command translate 'judge'"),
    ):
        assert main(["translate", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    text.write_text("one " * 60)
    assert main(["translate", "run", str(run), str(text)]) == 2
    assert "sentence 1 has" in capsys.readouterr().err


def test_a_checkpoint_that_is_none_of_a_translator(pairs, tmp_path):
    run = tmp_path / "run"
    train_translation(recipe(pairs), run)
    found = checkpoint.load(run / "final")
    for changes, sentence in (
        ({"kind": "graph"}, "holds no translator but a checkpoint of the kind 'graph'"),
        ({"vocabulary_fingerprint": "0" * 64}, "but the translator was trained with 000000000000"),
        ({"model": {**found.meta["model"], "dim": 64}}, "is damaged and describes no translator"),
    ):
        checkpoint.save(tmp_path / "other", found.weights, None, {**found.meta, **changes})
        with pytest.raises(UserError, match=sentence):
            load_translator(tmp_path / "other")
