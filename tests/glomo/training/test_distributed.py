"""Two processes give what one gives, to within rounding, and go on where they stopped; devices that are not there are
refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glomo.cli.main import main
from glomo.errors import UserError
from glomo.training import checkpoint
from glomo.training.distributed import join

HAMLET = Path(__file__).parents[2] / "data" / "hamlet-act-1.txt"


PLAIN = ["--train.threads", "1", "--train.device", "cpu", "--train.progress", "0", "--train.eval_every", "3"]
PLAIN += ["--train.precision", "fp32"]
SGD = ["--train.optimizer", "sgd", "--train.lr", "0.5", "--train.warmup", "0", "--train.decay", "constant"]
ADAM = ["--train.optimizer", "adamw", "--train.lr", "1e-3", "--train.weight_decay", "0"]
SINGLES = ["--train.batch_tokens", "24"]  # mostly a pair a batch, so that a process has nothing to do
SMALL = ["--model.dim", "32", "--model.ff", "64", "--model.layers", "2", "--model.dropout", "0"]


def pretrain(folder):
    more = ["--model.dim", "16", "--model.head_dim", "8", "--model.positions", "0", "--model.rescue_weight", "0"]
    return ["pretrain", "graph-tiny", "--data.text", str(HAMLET), *more, "--data.length", "24"]


def language_model(folder):
    return ["lm", "train", "lm-small", "--data.text", str(HAMLET), "--data.vocab_size", "400", *SMALL]


def lstm(folder):
    recipe = folder / "lstm.toml"
    recipe.write_text('command = "lm"\n[method]\nmodel = "lstm"\n[train]\nbatch_size = 6\n')
    dry = [f"--lstm.{name}" for name in ("dropout_input", "dropout_hidden", "dropout_output", "dropout_embedding")]
    dry = [word for name in (*dry, "--lstm.weight_drop") for word in (name, "0")]
    more = ["--data.vocab_size", "400", "--data.length", "20", "--lstm.preset", "tiny", *dry]
    return ["lm", "train", str(recipe), "--data.text", str(HAMLET), *more]


def translate(folder):
    pairs = folder / "pairs.tsv"
    words = HAMLET.read_text().split()
    lines = [" ".join(words[i : i + 5]) + "\t" + " ".join(reversed(words[i : i + 5])) for i in range(0, 2000, 5)]
    pairs.write_text("source\ttarget\n" + "\n".join(line.replace('"', "") for line in lines) + "\n")
    more = ["--data.vocab_size", "400", "--train.batch_tokens", "500"]
    return ["translate", "train", "translate-small", "--data.pairs", str(pairs), *more, *SMALL]


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("mps", "'mps'; it must be auto, cpu or cuda"),
        ("cuda:0", "'cuda:0'; it must be"),
        ("cuda", "no CUDA GPU here; auto or cpu"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, device, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"train.device is {sentence}" if device != "cuda" else sentence):
        join(device)
    assert join("auto").device.type == "cpu"


def run(command, out, steps, processes):
    """Start the command in so many processes."""
    options = next(i for i, word in enumerate(command) if word.startswith("--"))  # the last of two equal ones counts
    command = [*command[:options], *PLAIN, *SGD, *command[options:], "--out", str(out), "--train.steps", str(steps)]
    arguments = [sys.executable, "-m", "glomo", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes == 1:
        return [subprocess.Popen(arguments, env=environment)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(arguments, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]


@pytest.mark.skipif(os.name != "posix", reason="gloo over a local socket")
@pytest.mark.parametrize(
    ("command", "more"),
    [
        *((pretrain, []), (language_model, []), (lstm, []), (translate, [])),
        (translate, ["--train.shard", *ADAM, *SINGLES]),
    ],
    ids=["pretrain", "lm", "lm-lstm", "translate", "translate-sharded"],
)
def test_two_processes_train_as_one(tmp_path, command, more):
    """Two stop in the middle, and go on to the same bits as two that do not."""
    given = [*command(tmp_path), *more]
    tolerance = 1e-2 if "adamw" in more else 2e-4  # Adam's first steps are the signs of gradients, however small
    first = run(given, tmp_path / "one", 6, 1) + run(given, tmp_path / "two", 6, 2)
    first += run(given, tmp_path / "parts", 4, 2)
    assert [process.wait(timeout=600) for process in first] == [0] * 5
    assert [process.wait(timeout=600) for process in run(given, tmp_path / "parts", 6, 2)] == [0, 0]
    one, two, parts = (rows(tmp_path / name) for name in ("one", "two", "parts"))
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5, 6]
    for alone, together in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "units", "valid_loss"):
            if name in alone:
                assert together[name] == pytest.approx(alone[name], rel=tolerance), (alone["step"], name)
    if not more:
        assert one[0]["loss"] - one[-1]["loss"] > 0.005  # it did learn
    assert [row["loss"] for row in parts] == [row["loss"] for row in two]
    ours, theirs = (checkpoint.load(tmp_path / name / "final").weights for name in ("two", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.skipif(os.name != "posix", reason="gloo over a local socket")
def test_two_processes_fine_tune_in_stages(tmp_path):
    """Stopped within a stage, and gone on with to the same bits; only the named groups move, and of the heads only that
    of the step's task. (BatchNorm takes its statistics of each process's share: the losses are not those of one
    process.)"""
    books = tmp_path / "books.csv"
    books.write_text("text,label\n" + "to be,a\nor not,b\nthe king,c\n" * 9)  # batches of 13, 13, 1
    recipe = tmp_path / "finetune.toml"
    recipe.write_text(
        f'command = "finetune"\n[data]\ntrain = "{HAMLET.parent / "speeches-train.csv"}"\n'
        f'test = "{HAMLET.parent / "speeches-test.csv"}"\nvocab_size = 500\nlength = 30\n[classifier]\nhidden = 8\n'
        '[tune]\nmethod = "gradual-unfreeze"\nstage_steps = 3\nfactor = 2.6\n[train]\nbatch_size = 13\n'
        f'weight_decay = 0.1\n[tasks]\ntrain = ["{books}"]\nalpha = 0.0\n'
    )
    command = [
        "finetune",
        str(recipe),
        "--lstm.preset",
        "tiny",
        *ADAM,
        "--train.checkpoint_every",
        "1",
        "--train.keep",
        "99",
    ]
    first = run(command, tmp_path / "whole", 12, 2) + run(command, tmp_path / "parts", 11, 2)
    assert [process.wait(timeout=600) for process in first] == [0] * 4
    assert [process.wait(timeout=600) for process in run(command, tmp_path / "parts", 12, 2)] == [0, 0]
    whole, parts = (rows(tmp_path / name) for name in ("whole", "parts"))
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    assert [row["stage"] for row in whole] == ["last"] * 3 + ["last 2"] * 3 + ["last 3"] * 3 + ["all"] * 3
    learning = {"last": ("head", "others"), "last 2": ("head", "others", "language_model.encoder.layers.1")}
    learning["last 3"] = (*learning["last 2"], "language_model.encoder.layers.0")
    weights = [checkpoint.load(f).weights for f in checkpoint.step_folders(tmp_path / "whole" / "checkpoints")]
    heads = []
    for row, before, after in zip(whole[1:], weights, weights[1:], strict=False):
        moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
        heads.append({name.split(".")[0] for name in moved} - {"language_model"})
        groups = learning.get(row["stage"], ("head", "others", "language_model"))
        assert all(name.startswith(groups) for name in moved)
    assert all(len(of) == 1 for of in heads)
    assert set.union(*heads) == {"head", "others"}
    assert min(row["units"] for row in whole) == 2  # of one document, and a process without any
    ours, theirs = (checkpoint.load(tmp_path / name / "final").weights for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.skipif(os.name != "posix", reason="gloo over a local socket")
def test_two_processes_stay_close_as_one(tmp_path):
    """The old predictions' states are shared out as the model's are."""
    given = lstm(tmp_path)
    assert main([*given, *PLAIN, *SGD, "--train.steps", "2", "--out", str(tmp_path / "init")]) == 0
    given += ["--tune.init", str(tmp_path / "init"), "--data.vocabulary", "init"]
    given += ["--close.method", "outputs", "--close.strength", "30"]
    both = run(given, tmp_path / "one", 4, 1) + run(given, tmp_path / "two", 4, 2)
    assert [process.wait(timeout=600) for process in both] == [0] * 3
    for alone, together in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=2e-4)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=2e-4)


@pytest.mark.skipif(os.name != "posix", reason="gloo over a local socket")
def test_a_process_without_labelled_documents(tmp_path):
    """Of a batch of one the second process has none, and of the unlabelled texts a share: neither waits for the
    other. (Means over unlabelled texts are of each process's own: the losses are not those of one.)"""
    recipe = tmp_path / "finetune.toml"
    recipe.write_text(
        f'command = "finetune"\n[data]\ntrain = "{HAMLET.parent / "speeches-train.csv"}"\n'
        f'test = "{HAMLET.parent / "speeches-test.csv"}"\nvocab_size = 300\nlength = 20\n[classifier]\nhidden = 8\n'
        f'[unlabelled]\nmethod = "mean-teacher"\ntext = ["{HAMLET}"]\nbatch_size = 3\n[train]\nbatch_size = 1\n'
    )
    given = ["finetune", str(recipe), "--lstm.preset", "tiny", *ADAM]
    assert [process.wait(timeout=600) for process in run(given, tmp_path / "two", 4, 2)] == [0, 0]
    assert [row["step"] for row in rows(tmp_path / "two")] == [1, 2, 3, 4]
    weights = checkpoint.load(tmp_path / "two" / "final").weights
    assert all(value.isfinite().all() for value in weights.values())
