"""Several ways of training beside each other: what is run, gone on with, drawn and refused."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glomo.cli.main import main
from glomo.errors import UserError
from glomo.training import checkpoint
from glomo.training import compare as module
from glomo.training.compare import CompareConfig, Ways, compare, curves, summary, table
from glomo.training.config import dump_toml, load_recipe, read_toml
from glomo.training.finetune import finetune
from glomo.training.language import train_language_model
from glomo.training.translation import train_translation

HERE = Path(__file__).parents[2] / "data"
RECIPE = f"""command = "compare"
[data]
train = "{HERE / "speeches-train.csv"}"
test = "{HERE / "speeches-test.csv"}"
length = 30
vocab_size = 500
[classifier]
hidden = 8
chunk = 12
[lstm]
preset = "tiny"
[tune]
stage_steps = 1
[compare]
ways = ["full", "slow: full --train.lr 0", "gradual-unfreeze --tune.factor 2.6"]
seeds = 2
labels = [60, 0]
[train]
steps = 6
batch_size = 16
lr = 1e-2
eval_every = 2
checkpoint_every = 2
progress = 0
threads = 1
device = "cpu"
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def run_of(way, labels, seed, accuracy, **more):
    found = {"way": way, "labels": labels, "seed": seed, "test_accuracy": accuracy, "examples": labels or 100}
    return {**found, "trainable": 5, "parameters": 10, "seconds": 2.0 * seed, "memory": None, **more}


def test_means_and_spreads():
    runs = [run_of("a", 0, 0, 0.5), run_of("a", 0, 1, 0.7), run_of("b", 0, 0, 0.9, memory=2**20)]
    (a, b) = summary("t", runs)["ways"]
    assert (a["error"], a["std"], a["seconds"], a["memory"]) == pytest.approx((0.4, 0.2**0.5 / 10**0.5, 1.0, None))
    assert (b["error"], b["std"], b["seeds"], b["memory"]) == (pytest.approx(0.1), None, 1, 2**20)
    lines = table(summary("t", runs)).splitlines()
    assert lines[2].split() == ["a", "all", "40.00", "±", "14.14", "5", "10", "1.0"]
    assert lines[3].split() == ["b", "all", "10.00", "5", "10", "0.0", "1"]


def test_classes_that_no_run_was_trained_on():
    """Their figures stand beside the others, of ways that have them."""
    figures = dict.fromkeys(("chance", "seen", "unseen", "harmonic"), 0.25)
    runs = [
        run_of("a", 0, seed, 0.5, zero_shot={"accuracy": value, **figures}) for seed, value in enumerate([0.3, 0.5])
    ]
    found = summary("t", [*runs, run_of("b", 0, 0, 0.9)])
    assert found["ways"][0]["zero_shot"]["accuracy"] == pytest.approx((0.4, 0.1 * 2**0.5))
    assert "zero_shot" not in found["ways"][1]
    lines = table(found).splitlines()
    assert lines[0].split()[-10:] == ["zero-shot", "%", "chance", "%", "seen", "%", "unseen", "%", "harmonic", "%"]
    assert lines[2].split()[-15:-9] == ["40.00", "±", "14.14", "25.00", "±", "0.00"]
    assert lines[3].split() == ["b", "all", "10.00", "5", "10", "0.0"]
    assert "zero-shot" not in table(summary("t", [run_of("b", 0, 0, 0.9)]))


def test_the_same_call_goes_on(recipe, tmp_path, monkeypatch, capfd):
    """A death between two runs; then what is there is read back, and the rest trained."""
    out = tmp_path / "out"
    config = load_recipe(str(recipe), {"compare.labels": "0", "compare.seeds": "1"}, CompareConfig, "compare")
    started = module._run
    count = []

    def mortal(*arguments):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(arguments)
        return started(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_run", mortal)
        with pytest.raises(KeyboardInterrupt):
            compare(config, out)
    assert len(json.loads((out / "results.json").read_bytes())["runs"]) == 2
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    command = ["compare", str(recipe), "--out", str(out), "--compare.labels", "0", "--compare.seeds", "1"]
    assert main(command) == 0
    assert "gradual-unfreeze --tune.factor 2.6  all" in capfd.readouterr().out
    results = json.loads((out / "results.json").read_bytes())
    assert [run["way"] for run in results["runs"]] == ["full", "slow", "gradual-unfreeze --tune.factor 2.6"]
    assert {path.name for path in out.glob("*.png")} == {"trade-off.png", "curves.png"}
    assert all(len(points) == 3 for points in curves(results, out).values())

    def fail(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr("subprocess.Popen", fail)
    for path in out.rglob("config.toml"):  # as if they were older than two sections
        sections = read_toml(path)
        path.write_text(dump_toml({name: sections[name] for name in sections if name not in ("close", "unlabelled")}))
    assert compare(config, out) == results


def test_runs_from_a_language_model_are_read_back(recipe, tmp_path, monkeypatch):
    """A run folder records the sizes of the language model, which the recipe does not say."""
    language = ["lm", "train", "lm-lstm-small", "--lstm.preset", "tiny", "--lstm.dim", "24", "--train.steps", "2"]
    language += ["--data.text", str(HERE / "hamlet-act-1.txt"), "--train.threads", "1", "--train.progress", "0"]
    assert main([*language, "--out", str(tmp_path / "lm")]) == 0
    text = recipe.read_text().replace('[lstm]\npreset = "tiny"\n', "")
    recipe.write_text(text.replace("[tune]\n", f'[tune]\ninit = "{tmp_path / "lm"}"\n'))
    options = {"compare.labels": "0", "compare.seeds": "1", "compare.ways": "full"}
    config = load_recipe(str(recipe), options, CompareConfig, "compare")
    results = compare(config, tmp_path / "out")
    monkeypatch.setattr("subprocess.Popen", None)
    assert compare(config, tmp_path / "out") == results


def test_options_with_what_is_of_the_run():
    text = (
        "x: full --tune.init '{tune.init}-b/{labels}-{seed}' --distil.teachers {out}/full-{labels}-{seed},{out}/{other}"
    )
    (way,) = Ways(ways=(text,)).parsed()
    places = {"out": "/runs/{seed}", "tune.init": "lm"}
    found = module._options(way, 50, 2, places)
    assert found["tune.init"] == "lm-b/50-2"
    assert found["distil.teachers"] == "/runs/{seed}/full-50-2,/runs/{seed}/{other}"  # what is put in stays as it is
    assert module._options(way, 0, 1, places)["tune.init"] == "lm-b/all-1"


TRAIN = {("finetune",): finetune, ("lm", "train"): train_language_model, ("translate", "train"): train_translation}


def in_process(seen, config, command, recipe, options, folder):
    seen.append((options, folder))
    TRAIN[command](config, folder)
    return json.loads((folder / "results.json").read_bytes())


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs without processes of their own. Gives (options, folder) of each."""
    seen = []
    monkeypatch.setattr(module, "_run", lambda *arguments: in_process(seen, *arguments))
    return seen


def test_a_way_on_the_runs_of_an_earlier_one(recipe, tmp_path, monkeypatch, in_this_process):
    """A student of the teacher of its own labels and seed; a start from where another way has ended."""
    ways = ["a teacher: full", "student: full --distil.teachers {out}/a-teacher-{labels}-{seed} --distil.alpha 1"]
    ways += [
        "from it: full --tune.init {out}/student-{labels}-{seed} --train.lr 0",
        "all: full --tune.init '{tune.init}'",
    ]
    text = re.sub(r"ways = .*", f"ways = {json.dumps(ways)}", recipe.read_text().replace("steps = 6", "steps = 2"))
    recipe.write_text(text)
    config = load_recipe(str(recipe), {"compare.seeds": "1", "compare.labels": "60"}, CompareConfig, "compare")
    monkeypatch.chdir(tmp_path)
    compare(config, Path("out"))
    out = tmp_path / "out"
    runs = {folder.name: options for options, folder in in_this_process}
    assert runs.keys() == {"a-teacher-60-0", "student-60-0", "from-it-60-0", "all-60-0"}
    assert runs["student-60-0"]["distil.teachers"] == str(out / "a-teacher-60-0")  # from wherever it is called
    assert weights(out / "student-60-0") != weights(out / "a-teacher-60-0")
    assert weights(out / "from-it-60-0") == weights(out / "student-60-0", "best")
    assert runs["all-60-0"]["tune.init"] == ""


def weights(folder, part="final"):
    found = checkpoint.load(folder / part).weights
    return {name: t.tolist() for name, t in found.items() if name.startswith("language_model.")}


OTHERS = {
    "lm": f"""[data]
text = ["{HERE / "hamlet-act-1.txt"}"]
vocabulary = "words"
valid_units = 300
length = 16
[method]
model = "lstm"
[lstm]
preset = "tiny"
""",
    "translate": """[data]
pairs = ["pairs.tsv"]
vocab_size = 300
max_length = 20
[model]
preset = "tiny"
dim = 16
ff = 32
max_length = 32
""",
}


@pytest.mark.parametrize("of", OTHERS)
def test_language_models_and_translators_beside_each_other(of, tmp_path, monkeypatch, capsys):
    """By their validation loss."""
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    monkeypatch.chdir(tmp_path)
    pairs = "".join(f"{a} {b}\t{b.upper()} {a.upper()}\n" for a in "abcdefghij" for b in "klmnopqrst")
    Path("pairs.tsv").write_text("source\ttarget\n" + pairs)
    train = "steps = 6\nbatch_size = 8\nlr = 1e-2\neval_every = 3\ncheckpoint_every = 3\nprogress = 0\nthreads = 1\n"
    compared = f'of = "{of}"\nways = ["full", "still: full --train.lr 0"]\nseeds = 2\n'
    Path("recipe.toml").write_text(f'command = "compare"\n{OTHERS[of]}[compare]\n{compared}[train]\n{train}')
    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(module, "_run", lambda *arguments: in_process(seen, *arguments))
        assert main(["compare", "recipe.toml", "--out", "out"]) == 0
    first = capsys.readouterr().out
    assert [folder.name for _, folder in seen] == ["full-all-0", "still-all-0", "full-all-1", "still-all-1"]
    monkeypatch.setattr("subprocess.Popen", None)  # all is read back
    assert main(["compare", "recipe.toml", "--out", "out"]) == 0
    assert capsys.readouterr().out == first
    results = json.loads(Path("out/results.json").read_bytes())
    losses = {}
    for path in Path("out").glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        losses.setdefault(path.parent.name.split("-")[0], []).append(rows[-1]["valid_loss"])
        held = json.loads((path.parent / "results.json").read_bytes())
        size = sum(t.numel() for t in checkpoint.load(path.parent / "final").weights.values())
        assert (held["parameters"], held["trainable"], held["step"], held["budget"]) == (size, size, 6, 6)
    for row in results["ways"]:
        assert row["error"] == pytest.approx(statistics.fmean(losses[row["way"]]))
        assert row["std"] == pytest.approx(statistics.stdev(losses[row["way"]]))
    lines = first.splitlines()
    assert "validation loss" in lines[0]
    assert results["task"] == {"lm": "hamlet-act-1.txt", "translate": "pairs.tsv"}[of]
    assert f"{statistics.fmean(losses['full']):.4f} ± " in lines[2]
    difference = statistics.fmean(losses["still"]) - statistics.fmean(losses["full"])
    assert f"  {difference:+.3f} (" in lines[3]
    assert {path.name for path in Path("out").glob("*.png")} == {"trade-off.png", "curves.png"}


def test_what_is_compared(tmp_path, capsys):
    with pytest.raises(UserError, match=r"compare.labels is \(50,\), and compare.of 'lm', which has no labels"):
        Ways(of="lm", labels=(50,))
    with pytest.raises(UserError, match="'gradual-unfreeze' is no method"):
        Ways(("gradual-unfreeze",), of="translate")
    for key in ("train.batch_tokens", "data.max_length", "data.swap"):
        with pytest.raises(UserError, match=f"{key} must be equal for all ways"):
            Ways((f"full --{key} 1",), of="translate")
    path = tmp_path / "recipe.toml"
    for of, key in (("lm", "valid_units"), ("translate", "valid_pairs")):
        path.write_text(f'command = "compare"\n[compare]\nof = "{of}"\n[data]\n{key} = 0\n')
        assert main(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
        assert f"data.{key} is 0; ways of {of} are compared by their validation" in capsys.readouterr().err
    path.write_text('command = "compare"\ncompare = 3\n')
    assert main(["compare", str(path)]) == 2
    assert "'compare'" in capsys.readouterr().err
    path.write_text('command = "compare"\n[compare]\nof = "lm"\n[classifier]\nhidden = 3\n')
    assert main(["compare", str(path)]) == 2
    assert "unknown section [classifier]" in capsys.readouterr().err
    without = {"way": "a", "labels": 0, "seed": 0, "memory": None}
    with pytest.raises(UserError, match="the run of 'a' has no validation"):
        summary("t", [without])


def test_the_effect_against_the_first_way():
    """Of the errors, paired by seed, with Student's t of 95 % (12.706 of 2 pairs, 4.303 of 3)."""
    runs = [run_of("alone", 0, seed, accuracy) for seed, accuracy in enumerate((0.80, 0.84, 0.85))]
    runs += [run_of("tasks", 0, seed, accuracy) for seed, accuracy in ((2, 0.90), (0, 0.86), (1, 0.88))]
    runs += [run_of("other", 0, seed, accuracy) for seed, accuracy in ((0, 0.85), (2, 0.80))]
    runs += [run_of("worse", 0, seed, accuracy) for seed, accuracy in enumerate((0.60, 0.64, 0.65))]
    runs += [run_of("once", 0, 1, 0.99), run_of("new", 50, 0, 0.5), run_of("new", 50, 1, 0.6)]
    found = {row["way"]: row["effect"] for row in summary("t", runs)["ways"]}
    assert found["alone"] is found["once"] is found["new"] is None  # itself; one seed; none with as many labels
    differences = [0.06, 0.04, 0.05]
    error = statistics.stdev(differences) / 3**0.5
    assert found["tasks"] == {
        "gain": pytest.approx(0.05),
        "standard_error": pytest.approx(error),
        "low": pytest.approx(0.05 - 4.302653 * error, rel=1e-5),
        "high": pytest.approx(0.05 + 4.302653 * error, rel=1e-5),
        "pairs": 3,
        "verdict": "helps",
    }
    assert (found["other"]["verdict"], found["other"]["pairs"]) == ("within noise", 2)
    assert found["other"]["high"] == pytest.approx(12.7062 * 0.05, rel=1e-5)
    assert found["worse"]["verdict"] == "hurts"
    lines = table(summary("t", runs)).splitlines()
    assert lines[0].endswith("  against alone")
    ends = [
        "",
        "-5.0 (-7.5 to -2.5) helps",
        "+0.0 (-63.5 to +63.5) within noise",
        "+20.0 (+20.0 to +20.0) hurts",
        "",
        "",
    ]
    assert [line[lines[0].index("against") :] for line in lines[2:]] == ends
    alone = table(summary("t", [run for run in runs if run["way"] == "alone"]))
    assert "against" not in alone


def test_equal_seeds_draw_equal_examples(recipe, tmp_path, capfd):
    more = ["--compare.ways", "full,other: full", "--compare.seeds", "1"]
    assert main(["compare", str(recipe), "--out", str(tmp_path / "out"), *more]) == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_bytes())["runs"]
    one, other = (
        [{**run, "way": "", "seconds": 0, "memory": 0} for run in runs if run["way"] == way]
        for way in ("full", "other")
    )
    assert one == other
    assert [run["examples"] for run in one] == [54, 144]
    assert (tmp_path / "out" / "low-shot.png").exists()


@pytest.mark.parametrize(
    ("ways", "sentence"),
    [
        (("ful",), "'ful' is no method; the nearest known one is full"),
        (("full", "full"), "has 'full' and 'full', whose folders would be one"),
        (("a b: full", "a-b: top"), "has 'a b' and 'a-b', whose folders would be one"),
        (("full --train.steps 3",), "train.steps must be equal for all ways"),
        (("full --names.held_out 3",), "names.held_out must be equal for all ways"),
        (('full "abc',), "cannot be read: No closing quotation"),
        ((), "compare.ways is empty"),
        (("--train.lr 1",), "'nothing' is no method"),
    ],
)
def test_mistakes(ways, sentence):
    with pytest.raises(UserError, match=sentence):
        Ways(ways=ways)


def test_a_mistake_in_one_way_is_said_by_its_run(recipe, tmp_path, capfd):
    command = ["compare", str(recipe), "--out", str(tmp_path / "out"), "--compare.ways", "top --tune.top 9"]
    assert main(command) == 2
    error = capfd.readouterr().err
    assert "count is 9; of 4 layer groups" in error
    assert "ended with the code 2, for the reason above" in error
    other = [*command[:3], str(tmp_path / "other"), command[4], "full,top --tune.tops 9"]
    assert main(other) == 2
    assert "unknown key tune.tops" in capfd.readouterr().err
    assert not list((tmp_path / "other").glob("full*"))  # before anything was trained


@pytest.mark.skipif(os.name != "posix", reason="signals to a group of processes")
@pytest.mark.parametrize("told", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_the_run_within(recipe, tmp_path, told):
    """SIGTERM to the command, Ctrl-C to both as a terminal does: the run saves, and nobody goes on."""
    command = [sys.executable, "-m", "glomo", "compare", str(recipe), "--out", str(tmp_path / "out")]
    command += ["--compare.ways", "full", "--compare.seeds", "1", "--compare.labels", "0", "--train.steps", "100000"]
    command += ["--train.checkpoint_every", "0"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, **pipes)
    metrics = tmp_path / "out" / "full-all-0" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size > 500):
        time.sleep(0.05)
    if told == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    assert process.wait(100) == 128 + signal.Signals[told]
    error = process.stderr.read()
    assert "the same command goes on from there" in error
    assert "Traceback" not in error
    assert list((tmp_path / "out" / "full-all-0" / "checkpoints").glob("step-*"))
    size = metrics.stat().st_size
    time.sleep(0.5)
    assert metrics.stat().st_size == size  # nobody writes any more


def test_several_processes_are_refused(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "runs alone" in capsys.readouterr().err
