"""Studies: one table of graphs from several pre-trainings, and controls, that goes on where it stopped."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from glomo.data import Vocabulary
from glomo.errors import UserError
from glomo.nn import GLoMoConfig, random_graph
from glomo.training import study as module
from glomo.training.models import graph_fingerprint
from glomo.training.study import Study, StudyConfig, study, summary, table

HERE = Path(__file__).parents[2] / "data"
PRETRAIN = f"""
command = "pretrain"
[data]
text = ["{HERE / "hamlet-act-1.txt"}"]
vocab_size = 300
length = 32
[model]
dim = 16
layers = 2
heads = 2
head_dim = 8
conv_blocks = 1
decoder_layers = 1
[train]
steps = 2
threads = 1
device = "cpu"
"""
TRANSFER = f"""
command = "transfer"
[data]
train = "{HERE / "speeches-train.csv"}"
test = "{HERE / "speeches-test.csv"}"
length = 20
[features]
dim = 8
[head]
hidden = 8
[train]
steps = 2
threads = 1
device = "cpu"
"""
VARIANTS = (
    "learned: learned",
    "softmax: learned --pretrain.model.activation softmax",
    "last layer: learned --transfer.graph.layers last",
    "none: none",
)


@pytest.fixture
def recipes(tmp_path):
    (tmp_path / "graph.toml").write_text(PRETRAIN)
    (tmp_path / "task.toml").write_text(TRANSFER)
    recipes = {"pretrain": str(tmp_path / "graph.toml"), "transfer": (str(tmp_path / "task.toml"),)}
    return Study(**recipes, variants=VARIANTS, seeds=2, graphs=2, jobs=2)


def test_a_study_is_done_once(recipes, tmp_path, capsys):
    out = tmp_path / "out"
    results = study(StudyConfig(replace(recipes, seeds=1, graphs=1)), out)
    assert json.loads((out / "results.json").read_text()) == results
    # one pre-training for each way to pre-train, not for each variant
    assert sorted(path.name for path in (out / "graphs").glob("*.done")) == [
        "as-it-is-0.done",
        f"model.activation-softmax-{hashlib.sha256(b'model.activation softmax').hexdigest()[:6]}-0.done",
    ]
    runs = {(run["variant"], run["seed"]) for run in results["runs"]}
    assert runs == {(name, 0) for name in ("learned", "softmax", "last layer", "none")}
    assert results["losses"]["learned"] == results["losses"]["last layer"] != results["losses"]["softmax"]
    assert results["losses"]["none"] == []
    for name, graph in (("learned", "learned"), ("none", "none")):
        config = (out / "task" / f"{name}-0" / "config.toml").read_text()
        assert f'graphs = ["{graph}"]' in config
    assert 'layers = "last"' in (out / "task" / "last-layer-0" / "config.toml").read_text()

    capsys.readouterr()
    assert study(StudyConfig(replace(recipes, seeds=1, graphs=1)), out) == results
    assert capsys.readouterr().err == ""  # nothing was run
    moved = out.rename(tmp_path / "moved")
    assert study(StudyConfig(replace(recipes, seeds=1, graphs=1)), moved) == results
    assert capsys.readouterr().err == ""
    text = table(results)
    assert text.splitlines()[0] == "task"
    assert "it - learned" in text


def test_the_second_seed_takes_the_second_graph(recipes, tmp_path):
    study(StudyConfig(replace(recipes, variants=("learned: learned",))), tmp_path / "out")
    paths = [
        next(
            line
            for line in (tmp_path / "out/task" / f"learned-{seed}/config.toml").read_text().splitlines()
            if line.startswith("path")
        )
        for seed in (0, 1)
    ]
    assert [path.rstrip('"').rsplit("-", 1)[1] for path in paths] == ["0", "1"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"variants": ("x: lerned",)}, "'lerned' is no graph; the nearest known one is learned"),
        ({"variants": ("x: learned --model.dim 3",)}, "is neither --pretrain. nor --transfer."),
        ({"variants": ("a b: none", "a-b: none")}, "two whose folder would be 'a-b'"),
        ({"variants": ()}, "study.variants is empty"),
        ({"variants": ("\u00e9: none",)}, "a name without a letter or digit of ASCII"),
        ({"variants": ("x: none --pretrain.model.dim 8",)}, "is of the graph learned"),
        ({"variants": ("x: none --transfer.train.seed 3",)}, "train.seed is what the study itself sets"),
        ({"variants": ("x: learned --pretrain.train.seed 3",)}, "train.seed is what the study itself sets"),
        ({"variants": ("x: learned --pretrain.model.dmi 3",)}, "unknown key model.dmi"),
        ({"variants": ("x: none --transfer.graph.layers third",)}, "graph.layers is 'third'"),
        ({"pretrain": ""}, "names no recipes"),
        ({"seeds": 0}, "study.seeds is 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(recipes, tmp_path, monkeypatch, change, sentence):
    monkeypatch.setattr(module, "_do", lambda *_: pytest.fail("something was run"))
    with pytest.raises(UserError, match=sentence):
        study(StudyConfig(replace(recipes, **change)), tmp_path / "out")


def test_what_a_variant_says_goes_before_what_all_say():
    every = "--transfer.graph.cut 4 --pretrain.model.layers 3"
    variants = Study(variants=("a: learned --transfer.graph.cut 0", "b: none"), every=every).parsed()
    assert [variant.transfer for variant in variants] == [{"graph.cut": "0"}, {"graph.cut": "4"}]
    assert [variant.pretrain for variant in variants] == [{"model.layers": "3"}] * 2
    with pytest.raises(UserError, match="'learned none' is no graph"):
        Study(variants=("a: learned",), every="none")


def test_a_run_that_fails_is_a_sentence(recipes, tmp_path):
    variants = ("a: none", "b: uniform", "x: none --transfer.data.train nothing.csv")
    broken = replace(recipes, variants=variants, seeds=2, graphs=1, jobs=1)
    with pytest.raises(UserError, match=r"ended with the code 2: glomo: .*nothing.csv"):
        study(StudyConfig(broken), tmp_path / "out")
    so_far = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(run["variant"], run["seed"]) for run in so_far["runs"]] == [("a", 0), ("b", 0)]
    assert so_far["tasks"]["task"]["rows"][1]["difference"]["error"] is None  # of one seed


def test_without_a_run_of_the_first_variant_there_is_no_difference(recipes, tmp_path):
    variants = ("x: none --transfer.data.train nothing.csv", "b: uniform")
    with pytest.raises(UserError, match=r"nothing\.csv"):
        study(StudyConfig(replace(recipes, variants=variants, seeds=1, graphs=1, jobs=2)), tmp_path / "out")
    results = tmp_path / "out" / "results.json"
    assert not results.exists() or json.loads(results.read_text())["tasks"] == {}


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_study_that_is_stopped_goes_on(recipes, tmp_path):
    (tmp_path / "graph.toml").write_text(PRETRAIN.replace("steps = 2\n", "steps = 100000\n"))
    (tmp_path / "study.toml").write_text(
        'command = "study"\n[study]\n'
        f'pretrain = "{tmp_path / "graph.toml"}"\ntransfer = ["{tmp_path / "task.toml"}"]\n'
        'variants = ["learned: learned"]\nseeds = 1\n'
    )
    line = [sys.executable, "-m", "glomo", "study", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "graphs" / "as-it-is-0" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert "the same command goes on" in process.stderr.read()
    steps = len(metrics.read_text().splitlines())
    assert list((metrics.parent / "checkpoints").iterdir())
    # the pre-training was told to save, and goes on from there when it is shorter
    (tmp_path / "graph.toml").write_text(PRETRAIN.replace("steps = 2\n", f"steps = {steps + 1}\n"))
    assert subprocess.run(line, capture_output=True).returncode == 0
    assert len(metrics.read_text().splitlines()) == steps + 1


def test_differences_are_paired():
    def run(variant, seed, score):
        return {"task": "t", "variant": variant, "seed": seed, "measure": "f1", "figures": {"f1": score, "em": 0.1}} | {
            "share_zero": None,
            "share_dead": None,
            "seconds": 1.0,
        }

    runs = [run("a", 0, 0.50), run("a", 1, 0.70), run("b", 0, 0.53), run("b", 1, 0.71)]
    rows = summary(runs, {"a": [1.0], "b": []})["tasks"]["t"]["rows"]
    assert rows[0]["difference"] is None
    difference = rows[1]["difference"]
    assert difference["mean"] == pytest.approx(0.02)
    assert difference["error"] == pytest.approx(0.01)  # (0.03, 0.01): deviation 0.01 sqrt(2), of two seeds
    assert rows[1]["figures"] == {"f1": pytest.approx(0.62), "em": pytest.approx(0.1)}


def test_what_depends_on_a_graph_is_run_again_with_it(recipes, tmp_path, monkeypatch):
    ran = []

    def pretend(jobs, *_):
        for job in jobs:
            if not job.done:
                ran.append(job.folder.name)
                job.folder.mkdir(parents=True, exist_ok=True)
                job.end()
                run = {"figures": {"accuracy": 0.5}, "share_zero": None, "share_dead": None, "seconds": 1.0}
                (job.folder / "results.json").write_text(json.dumps({"measure": "accuracy", "runs": [run]}))
                (job.folder / "metrics.jsonl").write_text("")

    monkeypatch.setattr(module, "_do", pretend)
    signs = ("minus: learned --pretrain.model.initial_bias -1", "plus: learned --pretrain.model.initial_bias 1")
    config = StudyConfig(replace(recipes, variants=("learned: learned", "none: none", *signs), seeds=1, graphs=1))
    study(config, tmp_path / "out")
    assert len(ran) == len(set(ran)) == 3 + 4  # of minus and plus one each
    ran.clear()
    study(config, tmp_path / "out")
    assert ran == []
    recipe = tmp_path / "task.toml"
    recipe.write_text(recipe.read_text().replace("threads = 1", "threads = 2"))
    study(config, tmp_path / "out")
    assert ran == []  # changes no result
    stamps = [*(tmp_path / "out" / "task").glob("*.done")]

    def note(**values):
        for stamp in stamps:
            noted = json.loads(stamp.read_text())
            noted["transfer.graph.mixtures"] = 2
            noted.update(values)
            stamp.write_text(json.dumps({key: value for key, value in noted.items() if value is not None}))

    note(**{"transfer.graph.mixtures": None})  # made when there was no such option
    study(config, tmp_path / "out")
    assert ran == []
    note(**{"transfer.graph.mixtures": 3})  # made when it had another default
    study(config, tmp_path / "out")
    assert len(ran) == len(stamps) == 4
    ran.clear()
    note(**{"transfer.graph.gone": 3})  # with an option that is no more
    study(config, tmp_path / "out")
    assert len(ran) == 4
    ran.clear()
    stamps[0].write_text("{")
    study(config, tmp_path / "out")
    assert len(ran) == 1
    ran.clear()
    (tmp_path / "graph.toml").write_text(PRETRAIN.replace("steps = 2\n", "steps = 3\n"))
    study(config, tmp_path / "out")
    assert len(ran) == 3 + 4


def test_a_run_that_is_begun_anew_is_not_done(tmp_path):
    first, second = (module.Job((), tmp_path / "run", {"transfer.graph.cut": cut}) for cut in (1, 2))
    first.begin()
    first.end()
    assert first.done
    second.begin()  # and is interrupted
    assert not first.done
    assert not second.done


def test_the_weights_tell_a_graph_and_not_how_it_was_trained():
    config = GLoMoConfig(dim=8, layers=1, heads=1, head_dim=8, conv_blocks=1, vocab_size=5)
    vocabulary = Vocabulary(["a", "b", "c"])
    graph = random_graph(config, vocabulary, 0)
    later = random_graph(replace(config, l1_weight=0.5), vocabulary, 0)
    other = random_graph(replace(config, initial_bias=0.5), vocabulary, 0)
    for kind in ("learned", "random"):
        assert graph_fingerprint(graph, kind) == graph_fingerprint(later, kind) != graph_fingerprint(other, kind)


def test_a_graph_that_is_there_already(recipes, tmp_path):
    def pretrain(steps):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        line = [sys.executable, "-m", "glomo", "pretrain", recipes.pretrain, "--out", str(tmp_path / "run")]
        assert subprocess.run([*line, "--train.steps", str(steps)], capture_output=True).returncode == 0

    pretrain(2)
    given = replace(recipes, pretrain="", graph=str(tmp_path / "run"), seeds=1, graphs=1)
    with pytest.raises(UserError, match="nothing of it is pre-trained"):
        study(StudyConfig(given), tmp_path / "out")  # softmax would be
    given = replace(given, variants=("learned: learned", "random: random"))
    results = study(StudyConfig(given), tmp_path / "out")
    assert {run["variant"] for run in results["runs"]} == {"learned", "random"}
    assert not (tmp_path / "out" / "graphs").exists()
    assert len(results["losses"]["learned"]) == 1
    ended = {name: (tmp_path / "out" / "task" / f"{name}-0.done").stat().st_mtime_ns for name in ("learned", "random")}
    pretrain(3)  # better weights of the same settings: the control stays
    study(StudyConfig(given), tmp_path / "out")
    again = {name: (tmp_path / "out" / "task" / f"{name}-0.done").stat().st_mtime_ns for name in ended}
    assert again["random"] == ended["random"]
    assert again["learned"] > ended["learned"]
    study(StudyConfig(replace(given, variants=("learned: learned",))), tmp_path / "fresh")
    rows = [(tmp_path / out / "task" / "learned-0" / "learned-0" / "metrics.jsonl") for out in ("out", "fresh")]
    losses = [[json.loads(line)["loss"] for line in path.read_text().splitlines()] for path in rows]
    assert losses[0] == losses[1]  # trained anew, on the new graph
