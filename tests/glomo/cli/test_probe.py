"""The command that probes a run: its table, its files, and what it refuses."""

import json
from pathlib import Path

import pytest

from glomo.cli import main as command_line
from glomo.cli.probe import main, table
from glomo.data import Vocabulary, read_texts
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.training import checkpoint
from glomo.training.models import model_meta

HAMLET = str(Path(__file__).parents[2] / "data" / "hamlet-act-1.txt")


@pytest.fixture
def run(tmp_path):
    vocabulary = Vocabulary.build(read_texts(HAMLET), 200)
    config = AWDLSTMConfig.preset("tiny", dim=8, hidden=8, vocab_size=len(vocabulary))
    meta = {"method": {"model": "lstm"}, "data": {"length": 24}}
    meta = model_meta("language-model", config.to_dict(), vocabulary, meta)
    checkpoint.save(tmp_path / "run" / "final", LSTMLanguageModel(config).state_dict(), {}, meta)
    return str(tmp_path / "run")


def test_table_figures_and_picture(run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    given = ["--task", "shift", "--text", HAMLET, "--limit", "200", "--kind", "linear", "--pool", "last"]
    assert main([run, *given]) == 0
    printed = capsys.readouterr().out
    folder = Path(run) / "probes" / "shift"
    results = json.loads((folder / "results.json").read_bytes())
    assert printed.startswith(table(results))
    assert printed.splitlines()[0].split() == ["probe", "layer", "accuracy", "majority", "control", "selectivity"]
    assert [line.split()[0] for line in printed.splitlines()[1:5]] == ["linear"] * 4
    assert f"{results['left_out']:,} left out" in printed
    assert results["pool"] == "last"
    assert (folder / "probes.png").read_bytes().startswith(b"\x89PNG")
    assert main([run, *given, "--out", str(tmp_path / "other")]) == 0
    assert json.loads((tmp_path / "other" / "results.json").read_bytes()) == results


def test_the_table():
    figures = {"accuracy": 0.755, "majority": 0.5, "control": 0.25, "selectivity": 0.505}
    lines = table({"probes": [{"kind": "mlp", "layer": "layer 1", **figures}]}).splitlines()
    assert lines[1].split() == ["mlp", "layer", "1", "75.50", "50.00", "25.00", "50.50"]


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "usage: glomo probe RUN" in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN"], "probe needs a task"),
        (["RUN", "--task", "shift", "--depth", "3"], "unknown option --depth"),
        (["RUN", "--task", "shift"], "--text FILE or --dataset NAME is needed"),
        (["RUN", "--task", "shift", "--text", HAMLET, "--kind", "deep"], "--kind is 'deep'"),
        (["RUN", "--task", "shift", "--text", HAMLET, "--limit", "many"], "--limit is 'many', but a whole number"),
        (["RUN", "--task", "shift", "--text", HAMLET, "--per-word", "0"], "--per_word is 0"),
        (["nowhere", "--task", "shift", "--text", HAMLET], "nowhere"),
        (["--task", "shift", "--text", HAMLET], "one folder is needed"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, run, capsys, monkeypatch):
    monkeypatch.setitem(command_line.COMMANDS, "probe", "")
    assert command_line.main(["probe", *(run if word == "RUN" else word for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
