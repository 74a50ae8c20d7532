"""From a language model to a classifier on small files: every method, both encoders, deaths, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glomo.cli.main import main
from glomo.data import read_labelled, vocabulary_from_dict
from glomo.data.vocabulary import split_words
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.training import checkpoint, language
from glomo.training.distributed import World
from glomo.training.document_classifier import DocumentClassifier, layer_patterns
from glomo.training.documents import FinetuneData
from glomo.training.finetune import finetune, prepare
from glomo.training.finetune_config import ClassifierConfig, FinetuneConfig
from glomo.training.language import LanguageConfig, LanguageData, LanguageMethod, train_language_model
from glomo.training.train_config import TrainConfig
from glomo.training.trained_classifier import load_classifier
from glomo.training.tune import Tune
from glomo.transfer import feature_extraction, layer_groups, optimizer_groups

HERE = Path(__file__).parents[2] / "data"
TRAIN = TrainConfig(
    steps=10, batch_size=16, lr=1e-2, eval_every=3, checkpoint_every=3, progress=0, device="cpu", threads=1
)
DATA = FinetuneData(str(HERE / "speeches-train.csv"), str(HERE / "speeches-test.csv"), length=30)
TRANSFORMER = TransformerConfig.preset("tiny", dim=16, ff=32, heads=2, max_length=48, norm="pre")
LSTM = AWDLSTMConfig.preset("tiny", dim=16, hidden=16)


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    """{kind: folder} of forward models, and a backward one."""
    found = {}
    for name, kind, backward in (
        ("lstm", "lstm", False),
        ("transformer", "transformer", False),
        ("back", "lstm", True),
    ):
        out = tmp_path_factory.mktemp("lm") / name
        data = LanguageData((str(HERE / "hamlet-act-1.txt"),), vocabulary="words", vocab_size=600, length=24)
        method = LanguageMethod(kind, backward)
        train_language_model(
            LanguageConfig(data, method, TRANSFORMER, LSTM, train=replace(TRAIN, steps=3, eval_every=0)), out
        )
        found[name] = str(out)
    return found


def config(init="", train=TRAIN, data=DATA, classifier=None, **tune):
    classifier = classifier or ClassifierConfig(hidden=8, chunk=12, window=2)
    lstm = AWDLSTMConfig.preset("classifier", dim=16, hidden=16, layers=2)
    return FinetuneConfig(data, classifier, TRANSFORMER, lstm, Tune(init, **tune), train)


def weights(path, part="final"):
    return checkpoint.load(Path(path) / part).weights


METHODS = [
    *({"method": "full"}, {"method": "full", "factor": 2.6}, {"method": "top"}, {"method": "features"}),
    *({"method": "gradual-unfreeze", "stage_steps": 2, "factor": 2.6}, {"method": "chain-thaw", "lower_lr": 1e-3}),
    {"method": "sequential", "stage_steps": 2, "n": 2, "k": 3, "lower_lr": 1e-3},
]


@pytest.mark.parametrize("tune", METHODS, ids=lambda tune: "-".join(map(str, tune.values())))
@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_methods_and_what_they_move(tmp_path, language_models, kind, tune):
    init = language_models[kind]
    results = finetune(config(init, **tune), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert 0 <= results["test_accuracy"] <= 1
    before, after = weights(init), weights(tmp_path)
    prefix = "language_model."
    moved = {
        name.removeprefix(prefix)
        for name, value in after.items()
        if name.startswith(prefix) and not torch.equal(value, before[name.removeprefix(prefix)])
    }
    if tune["method"] in ("top", "features"):
        assert not moved
        assert results["trainable"] < results["parameters"] / 2
    elif tune["method"] != "chain-thaw":
        assert len(moved) >= len(before) - 1  # an LSTM's decoder learns from the auxiliary loss only
        assert results["trainable"] == results["parameters"]
    texts = ["To be, or not to be", "", "unheardof"]
    loaded = load_classifier(tmp_path)
    assert loaded.probabilities(texts).sum(1).tolist() == pytest.approx([1.0] * 3)
    assert set(loaded.predict(texts)) <= set(loaded.classes)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_a_mix_of_the_layers(tmp_path, language_models, kind):
    mixed = ClassifierConfig(hidden=8, chunk=12, window=2, layers="mix")
    finetune(config(language_models[kind], classifier=mixed, method="features"), tmp_path)
    assert weights(tmp_path)["mix.weights"].shape == (3,)
    assert weights(tmp_path)["mix.weights"].any()


def test_from_random_weights(tmp_path):
    for model in ("lstm", "transformer"):
        classifier = ClassifierConfig(model, hidden=8, chunk=12, window=2)
        results = finetune(config(classifier=classifier), tmp_path / model)
        assert results["examples"] == 144


@pytest.mark.parametrize("tune", METHODS[4:], ids=lambda tune: tune["method"])
def test_kill_9_in_a_stage_changes_nothing(tmp_path, language_models, tune):
    """The same command again: same rows to the last bit, same files."""
    recipe = tmp_path / "recipe.toml"
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in tune.items())
    recipe.write_text(
        f'command = "finetune"\n[data]\ntrain = "{DATA.train}"\ntest = "{DATA.test}"\nlength = 30\n'
        f'[classifier]\nhidden = 8\nchunk = 12\nwindow = 2\n[tune]\ninit = "{language_models["lstm"]}"\n{lines}'
        "[train]\nsteps = 40\nbatch_size = 16\nlr = 1e-2\neval_every = 3\ncheckpoint_every = 3\nprogress = 0\n"
        'device = "cpu"\nthreads = 1\n'
    )
    command = [sys.executable, "-m", "glomo", "finetune", str(recipe), "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 5:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)

    def rows(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    assert rows("killed") == rows("whole")
    assert len({row["stage"] for row in rows("whole")}) > 1
    for part in ("best", "final"):
        for name, value in weights(tmp_path / "whole", part).items():
            assert torch.equal(value, weights(tmp_path / "killed", part)[name])


def test_forward_and_backward_together(tmp_path, language_models):
    for name in ("lstm", "back"):
        finetune(config(language_models[name]), tmp_path / name)
    both = load_classifier(tmp_path / "lstm", tmp_path / "back")
    assert [member.backward for member in both.members] == [False, True]
    texts = ["What is the matter?", "a b c d"]
    parts = [member.probabilities(texts) for member in both.members]
    torch.testing.assert_close(both.probabilities(texts), (parts[0] + parts[1]) / 2)
    assert not torch.equal(parts[1], both.members[1].probabilities([" ".join(t.split()[::-1]) for t in texts]))


def test_classes_that_differ(tmp_path, language_models):
    finetune(config(language_models["lstm"]), tmp_path / "a")
    (tmp_path / "x.csv").write_text("text,label\n" + "to be,x\nor not,y\n" * 20)
    other = replace(DATA, train=str(tmp_path / "x.csv"), test=str(tmp_path / "x.csv"))
    finetune(config(language_models["lstm"], data=other), tmp_path / "b")
    with pytest.raises(UserError, match=r"knows the classes As You Like It, Hamlet, but .* knows x, y"):
        load_classifier(tmp_path / "a", tmp_path / "b")


def test_documents_longer_than_any_limit(tmp_path, language_models):
    """Read to their end, in bounded memory; what stands at the end decides as well."""
    words = (HERE / "hamlet-act-1.txt").read_text().split()
    long = " ".join(words[:4000])
    (tmp_path / "x.csv").write_text("text,label\n" + f'"{long.replace(chr(34), "")} yes",x\n"no",y\n' * 4)
    data = FinetuneData(str(tmp_path / "x.csv"), str(tmp_path / "x.csv"), valid=0.0)
    for kind in ("lstm", "transformer"):
        finetune(config(language_models[kind], data=data, train=replace(TRAIN, steps=1)), tmp_path / kind)
        model = load_classifier(tmp_path / kind)
        one, other = model.probabilities([long + " yes", long + " no"])
        assert not torch.equal(one, other)


def test_rare_words_are_unknown(tmp_path):
    """Of a new vocabulary: then there are unknown words to learn from."""
    counts = Counter(word for text, _ in read_labelled(DATA.train) for word in split_words(text))
    for least in (1, 3):
        work = prepare(config(data=replace(DATA, min_count=least, length=0)), World(0, 1, torch.device("cpu")))
        vocabulary = vocabulary_from_dict(work.task.meta["vocabulary"])
        frequent = {word for word, count in counts.items() if count >= least and word.isalpha()}
        assert {word for word in vocabulary.units()[2:] if word.isalpha()} == frequent
        documents = [work.task.batches.batch(step) for step in range(len(work.task.batches))]
        work.task.loss([n for batch in documents for n in batch], torch.Generator())[0].backward()
        learned = work.model.language_model.encoder.embedding.weight.grad[vocabulary.unk_id]
        assert bool(learned.any()) == (least == 3)
    with pytest.raises(UserError, match=r"data\.min_count is 0"):
        replace(DATA, min_count=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "gradual-unfreeze", "stage_steps": 4}, "3 stages of 4 steps leave nothing of 10 steps"),
        ({"rates": (1.0,), "method": "top"}, "tune.rates goes with the methods full and gradual-unfreeze"),
        ({"rates": (0.0,) * 4}, "tune.rates are all 0"),
        ({"last_cut_frac": 0.2}, "tune.last_cut_frac is of a schedule that begins anew"),
        ({"train": replace(TRAIN, shard=True)}, "train.shard divides the models of"),
        ({"rates": (1.0, 0.5)}, "tune.rates has 2 rates; there are 4 layer groups: embedding, layer.0, layer.1, head"),
        ({"method": "top", "top": 9}, "count is 9; of 4 layer groups"),
        ({"init": "none"}, "no checkpoint folder none"),
        ({"data": replace(DATA, labels=1)}, "has no example among the 1 to train on"),
        ({"classifier": ClassifierConfig(chunk=49)}, "classifier.chunk is 49; the Transformer reads at most 48"),
        ({"data": replace(DATA, valid=0.0), "method": "chain-thaw"}, "goes by validations, and there are none"),
    ],
)
def test_mistakes(tmp_path, language_models, change, sentence):
    init = language_models["transformer" if "classifier" in change else "lstm"]
    with pytest.raises(UserError, match=sentence):
        finetune(config(**{"init": init, **change}), tmp_path)


def test_a_mix_of_unequal_widths(tmp_path, language_models):
    mixed = ClassifierConfig(layers="mix")
    broad = replace(config(classifier=mixed), lstm=AWDLSTMConfig.preset("tiny"))
    with pytest.raises(UserError, match="'mix', but the layers are 32, 48, 32 wide"):
        finetune(broad, tmp_path)


def test_a_changed_recipe_names_the_key_and_loses_nothing(tmp_path, language_models):
    original = config(language_models["lstm"], method="gradual-unfreeze", stage_steps=2)
    finetune(original, tmp_path)
    changed = replace(original, tune=replace(original.tune, factor=3.0))
    with pytest.raises(UserError, match=r"tune.factor is 1.0 there and 3.0 in this"):
        finetune(changed, tmp_path)
    finetune(original, tmp_path)


def test_a_model_that_is_no_language_model(tmp_path, language_models, capsys):
    checkpoint.save(tmp_path / "graph", {"x": torch.zeros(1)}, None, {"kind": "graph"})
    with pytest.raises(UserError, match="holds no language model but a checkpoint of the kind 'graph'"):
        finetune(config(str(tmp_path / "graph")), tmp_path / "again")
    with pytest.raises(UserError, match="holds no document classifier"):
        load_classifier(language_models["lstm"])
    assert main(["finetune", "no-such-recipe"]) == 2
    assert "there is no recipe 'no-such-recipe'" in capsys.readouterr().err


def test_on_the_command_line(tmp_path, language_models, capsys):
    recipe, run = tmp_path / "r.toml", str(tmp_path / "run")
    recipe.write_text(
        f'command = "finetune"\nabout = "x"\n[data]\ntrain = "{DATA.train}"\ntest = "{DATA.test}"\n[tune]\n'
        f'init = "{language_models["lstm"]}"\n[train]\nsteps = 3\nprogress = 0\nthreads = 1\n'
    )
    assert main(["finetune", str(recipe), "--out", run]) == 0
    said = capsys.readouterr().out
    accuracy = json.loads((Path(run) / "results.json").read_bytes())["test_accuracy"]
    assert f"test accuracy {100 * accuracy:.2f} %" in said
    assert main(["finetune", "eval", run, run, "--test", DATA.test]) == 0
    assert f"accuracy  {accuracy:,}" in capsys.readouterr().out
    assert main(["finetune", str(recipe), "--help"]) == 0
    assert "--classifier.chunk 70" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    assert main(["finetune", "rates", str(recipe), "--out", str(tmp_path / "rates")]) == 0
    assert "--train.lr" in capsys.readouterr().out
    assert (tmp_path / "rates" / "rates.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["eval"], "eval needs labelled examples"),
        (["eval", "--test", DATA.test], "eval needs the folder of a classifier"),
        (["eval", "x", "--tset", DATA.test], "unknown option --tset; the nearest known one is --test"),
        (["eval", "x", "--test", DATA.test], "there is no checkpoint folder x"),
        (["rates"], "`glomo finetune rates` needs one recipe"),
    ],
)
def test_mistakes_on_the_command_line(words, sentence, capsys):
    assert main(["finetune", *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize("layers", ["last", "mix"])
def test_the_loss_by_its_formula(kind, layers):
    """What a document adds is its own: its nats, its penalties; whatever else is in the batch (BatchNorm apart)."""
    torch.manual_seed(0)
    if kind == "lstm":
        encoder = LSTMLanguageModel(replace(LSTM.scaled(0), vocab_size=40))
    else:
        encoder = LanguageModel(replace(TRANSFORMER, vocab_size=40, dropout=0.0, smoothing=0.0))
    model = DocumentClassifier(encoder, 2, chunk=8, window=9, layers=layers, dropouts=(0.0, 0.0)).double()
    for norm in (model.head[0], model.head[4]):
        norm.eval()
    lengths, labels = torch.tensor([9, 30, 4, 17, 25]), torch.tensor([0, 1, 1, 0, 1])
    units = torch.randint(2, 40, (5, 30))
    expected = []
    for row, length, label in zip(units, lengths.tolist(), labels, strict=True):
        one, alone = row[None, :length], lengths.new_tensor([length])
        following = torch.cat([one[:, 1:], torch.tensor([[encoder.end]])], 1)
        value = torch.nn.functional.cross_entropy(model(one, alone), label[None])
        penalty = 0.0
        if kind == "lstm":
            encoded = encoder.encoder(one)
            scores = encoder.logits(encoded.dropped)
            changes = [encoded.raw[:, t + 1] - encoded.raw[:, t] for t in range(length - 1) if (t + 1) % 8]
            penalty = 2 * encoded.dropped.square().mean() + torch.stack(changes).square().mean()
        else:
            scores = torch.cat([encoder.logits(encoder.hidden(one[:, i : i + 8])) for i in range(0, length, 8)], 1)
        expected.append(value + 0.3 * torch.nn.functional.cross_entropy(scores[0], following[0]) + penalty)
    features, extra = model.pooled(units, lengths, 0.3)
    found = torch.nn.functional.cross_entropy(model.head(features), labels) + extra
    torch.testing.assert_close(found.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_features_below_a_stage_are_fixed():
    """With two groups that learn the embedding's dropout is off as well, and the last layer's on."""
    torch.manual_seed(0)
    encoder = LSTMLanguageModel(AWDLSTMConfig.preset("classifier", dim=12, hidden=12, layers=2, vocab_size=40))
    model = DocumentClassifier(encoder, 2, chunk=8)
    groups = layer_groups(model, layer_patterns(model, language.layer_patterns(encoder)))
    stage = next(feature_extraction(groups, 1, 1.0, count=2))
    stage.begin(model, groups, torch.optim.SGD(optimizer_groups(groups, 1.0)))
    stage.set_modes(model)
    units = torch.randint(2, 40, (3, 7))
    one, other = encoder.encoder(units), encoder.encoder(units)
    assert torch.equal(one.layers[1], other.layers[1])
    assert not torch.equal(one.layers[2], other.layers[2])
