"""The command line: commands are found, and every mistake is one sentence on stderr and the exit code 2."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glomo.cli.main import main
from glomo.data import Vocabulary
from glomo.training import checkpoint
from glomo.training.run_folder import RunFolder

DATA = Path(__file__).parents[2] / "data"
HAMLET, TRAIN, TEST = (str(DATA / name) for name in ("hamlet-act-1.txt", "speeches-train.csv", "speeches-test.csv"))
TINY = [
    *("--model.dim", "8", "--model.head_dim", "4", "--model.conv_blocks", "1", "--data.length", "16"),
    *("--train.threads", "1", "--train.device", "cpu", "--train.progress", "0", "--train.batch_size", "4"),
    *("--train.checkpoint_every", "2", "--train.eval_every", "2"),
]


def pretrain(out, text, *more, steps=4):
    return main(
        ["pretrain", "graph-tiny", "--data.text", str(text), "--out", str(out), *TINY, f"--train.steps={steps}", *more]
    )


def transfer(out, train, test, *more):
    small = ["--train.steps", "2", "--train.threads", "1", "--train.progress", "0", "--compare.seeds", "1"]
    files = ["--data.train", str(train), "--data.test", str(test), "--out", str(out), "--compare.graphs", "uniform"]
    return main(["transfer", "transfer-tiny", *files, *small, *more])


def refused(code, capsys, *words):
    """One sentence on stderr that has these words, no traceback, exit code 2."""
    said = capsys.readouterr()
    assert code == 2
    last = said.err.splitlines()[-1]
    assert last.startswith("glomo: ")
    assert "Traceback" not in said.err
    for word in words:
        assert word in last
    return said


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "graph"
    assert pretrain(out, HAMLET) == 0
    return out


def test_the_canonical_call(graph, capsys):
    rows = [json.loads(line) for line in (graph / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(isinstance(row["loss"], float) for row in rows)
    assert {p.name for p in graph.iterdir()} >= {"config.toml", "metrics.jsonl", "checkpoints", "best", "final"}


def test_commands_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("glomo ")
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    for name in ("pretrain", "transfer", "plot", "info", "data", "recipes"):
        assert name in usage
    assert main(["pretrain", "graph-tiny", "--help"]) == 0
    assert "--train.steps 300" in capsys.readouterr().out
    assert main(["transfer", "-h"]) == 0
    assert "transfer-tiny" in capsys.readouterr().out
    assert main([]) == 2


def test_mistakes_in_the_command_line(capsys, tmp_path):
    refused(main(["pretrian"]), capsys, "'pretrian'", "pretrain")
    refused(main(["pretrain"]), capsys, "needs one recipe", "graph-tiny")
    refused(main(["pretrain", "graph-tinny"]), capsys, "graph-tiny")
    refused(main(["pretrain", "transfer-tiny"]), capsys, "`glomo transfer`")
    refused(main(["pretrain", "graph-tiny", "--train.stpes", "3"]), capsys, "train.stpes", "train.steps")
    refused(main(["pretrain", "graph-tiny", "--train.steps", "many"]), capsys, "train.steps", "'many'", "whole number")
    refused(main(["pretrain", "graph-tiny", "--model.norm", "batch"]), capsys, "model.norm", "layer")
    refused(main(["pretrain", "graph-tiny", "--model.preset", "papr"]), capsys, "papr", "paper")
    refused(main(["pretrain", "graph-tiny", "--out", str(tmp_path / "o")]), capsys, "--data.text")


@pytest.mark.parametrize("command", [["info"], ["pretrain", "graph-tiny"], ["recipes", "ls"]])
def test_a_backend_that_does_not_exist(capsys, monkeypatch, command):
    monkeypatch.setenv("GLOMO_BACKEND", "foo")
    refused(main(command), capsys, "GLOMO_BACKEND", "'foo'", "blocked")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--train.device", "foo"], ["train.device", "'foo'", "auto, cpu or cuda"]),
        (["--train.threads", "100000"], ["train.threads", "100000"]),
        (["--train.seed", str(2**63)], ["train.seed", str(2**63)]),
        (["--train.momentum", "2"], ["train.momentum", "0 to 1"]),
        (["--data.valid_windows", "-3"], ["data.valid_windows", "-3"]),
        (["--model.masked_sources", "99999"], ["model.masked_sources", "99999"]),
        (["--model.masked_sources", "-1"], ["model.masked_sources", "-1"]),
        (["--model.dim", "1" + "0" * 14], ["out of memory", "train.batch_size"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_settings_that_cannot_work(tmp_path, capsys, option, words):
    refused(pretrain(tmp_path / "out", HAMLET, *option), capsys, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_to_a_full_disk(unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    call = [sys.executable, "-m", "glomo", "--help"]
    with open("/dev/full", "w") as full:
        found = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert found.returncode == 2
    assert found.stderr == "glomo: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b" \n\n", ["t.txt"]),
        (b"caf\xe9 au lait\n", ["UTF-8"]),
        (b"two words\n", ["2 units", "4 are needed"]),  # D is 3
    ],
)
def test_text_that_cannot_be_trained_on(tmp_path, capsys, content, words):
    (tmp_path / "t.txt").write_bytes(content)
    refused(pretrain(tmp_path / "out", tmp_path / "t.txt"), capsys, *words)
    refused(pretrain(tmp_path / "out", tmp_path / "absent.txt"), capsys, "absent.txt")


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ("text,label\na b,x\nc d,y\n", "text,label\na,z\n", ["'z'", "unknown"]),
        ("text,label\na b,x\nc d,x\n", "text,label\na,x\n", ["one class only", "'x'"]),
        ("text,labl\na b,x\nc d,y\n", "text,label\na,x\n", ["'label'", "labl"]),
        ("", "text,label\na,x\n", ["empty"]),
    ],
)
def test_tasks_that_cannot_be_learned(tmp_path, capsys, train, test, words):
    (tmp_path / "a.csv").write_text(train)
    (tmp_path / "b.csv").write_text(test)
    refused(transfer(tmp_path / "out", tmp_path / "a.csv", tmp_path / "b.csv"), capsys, *words)
    assert not (tmp_path / "out").exists()


def test_transfer_prints_the_comparison(tmp_path, capsys, graph):
    assert transfer(tmp_path / "out", TRAIN, TEST, "--graph.path", str(graph), "--compare.graphs", "none,learned") == 0
    said = capsys.readouterr().out
    assert "learned - it" in said
    assert str(tmp_path / "out" / "results.json") in said


def damage(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_checkpoint_cut_in_half(tmp_path, capsys):
    assert pretrain(tmp_path / "out", HAMLET) == 0
    damage(tmp_path / "out" / "checkpoints" / "step-000004")
    whole = (tmp_path / "out" / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert pretrain(tmp_path / "out", HAMLET) == 0  # the older one is used, and the same losses come again
    assert "going back to step-000002" in capsys.readouterr().err
    losses = [
        [json.loads(row)["loss"] for row in text.splitlines()]
        for text in (whole, (tmp_path / "out" / "metrics.jsonl").read_text())
    ]
    assert losses[0] == losses[1]
    for folder in checkpoint.step_folders(tmp_path / "out" / "checkpoints"):
        damage(folder)
    refused(pretrain(tmp_path / "out", HAMLET), capsys, "model.safetensors", "cut")
    damage(tmp_path / "out" / "best")
    refused(
        transfer(tmp_path / "t", TRAIN, TEST, "--graph.path", str(tmp_path / "out")), capsys, "model.safetensors", "cut"
    )


def test_a_checkpoint_of_another_vocabulary(tmp_path, capsys, graph):
    meta = json.loads((graph / "final" / "meta.json").read_text())
    copy = tmp_path / "final"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((graph / "final" / "model.safetensors").read_bytes())
    other = Vocabulary.build(["other words"], 9)
    (copy / "meta.json").write_text(json.dumps({**meta, "vocabulary": other.to_dict()}))
    code = transfer(tmp_path / "t", TRAIN, TEST, "--graph.path", str(copy))
    refused(code, capsys, other.fingerprint[:12], meta["vocabulary_fingerprint"][:12])


def test_the_output_folder_of_another_run(tmp_path, capsys, graph):
    before = (graph / "metrics.jsonl").read_bytes()
    refused(pretrain(graph, HAMLET, "--train.lr", "0.5"), capsys, "train.lr is 0.003 there and 0.5")
    refused(transfer(graph, TRAIN, TEST), capsys, "holds a pretrain run")
    (tmp_path / "x").write_text("x")
    refused(pretrain(tmp_path, HAMLET), capsys, "other things")
    assert (graph / "metrics.jsonl").read_bytes() == before
    assert checkpoint.load(graph / "final").meta["step"] == 4


def test_a_full_disk_loses_nothing(tmp_path, capsys, monkeypatch):
    assert pretrain(tmp_path / "out", HAMLET) == 0
    original = checkpoint.write_file

    def full(path, data):
        if path.name == "train_state.pt":
            path.write_bytes(data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", full)
        refused(pretrain(tmp_path / "out", HAMLET, steps=8), capsys, "cannot save", "No space left on device")
    found = checkpoint.latest(tmp_path / "out" / "checkpoints")
    assert found is not None
    assert found.meta["step"] == 4
    assert pretrain(tmp_path / "out", HAMLET, steps=8) == 0  # with room again it goes on


def test_a_file_size_limit_in_a_process_of_its_own(tmp_path):
    """The operating system itself refuses to write more: as a full disk, but for the error's number."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from glomo.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    call = ["pretrain", "graph-tiny", "--data.text", HAMLET, "--out", str(tmp_path / "out"), *TINY]
    found = subprocess.run(
        [sys.executable, "-c", code, *call], capture_output=True, text=True, check=False, timeout=100
    )
    assert found.returncode == 2
    assert found.stderr.startswith("glomo: cannot save")
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_first(tmp_path, capsys, monkeypatch, number, code):
    original = RunFolder.log

    def log(self, row):
        original(self, row)
        if row["step"] == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        assert pretrain(tmp_path / "out", HAMLET) == code
    assert "stopped after step 4, which is saved" in capsys.readouterr().err
    found = checkpoint.latest(tmp_path / "out" / "checkpoints")
    assert found is not None
    assert found.meta["step"] == 4


def test_recipes(tmp_path, capsys, monkeypatch):
    assert main(["recipes", "ls"]) == 0
    assert "graph-tiny" in capsys.readouterr().out
    target = tmp_path / "mine.toml"
    assert main(["recipes", "cp", "graph-tiny", str(target)]) == 0
    assert target.read_text().startswith('command = "pretrain"')
    refused(main(["recipes", "cp", "graph-tiny", str(target)]), capsys, "exists already")
    refused(main(["recipes", "cp", "grph-tiny"]), capsys, "graph-tiny")
    refused(main(["recipes", "lss"]), capsys, "ls")
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "cp", "transfer-tiny"]) == 0
    assert (tmp_path / "transfer-tiny.toml").exists()
    assert main(["pretrain", str(target), "--help"]) == 0
