"""Choosing tile shapes: what is written, and when."""

import importlib.util
import json
import math
import os
import time
import types

import pytest

from bench import tune
from bench.tune import Configuration, Entry
from glomo.kernels import configurations

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no machine code"),
]
SMALL, LARGE = Configuration(32, 32, 64, 4, 1), Configuration(256, 256, 64, 4, 2)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "default.json").write_text((tune.TUNED / "default.json").read_text())
    return tmp_path


def run(folder, wanted, minutes=10.0, jobs=1):
    deadline = time.monotonic() + 60 * minutes
    return tune.tune(wanted, "90", True, folder, folder / "record.jsonl", jobs, deadline)


def test_the_best_candidate_gets_into_the_table_and_a_second_run_keeps_it(folder, monkeypatch):
    """One tile fits, the other spills: the machine code decides."""
    entry = Entry("relu2_attention", "bfloat16", 64, 0)
    monkeypatch.setattr(tune, "candidates", lambda entry: [LARGE, SMALL])
    monkeypatch.setattr(tune, "current", lambda entry, arch: LARGE)
    assert run(folder, [entry])
    table = json.loads((folder / "sm_90.json").read_text())
    assert table["relu2_attention"]["bfloat16"][0] == {"width": 64, "weight": 0, **SMALL._asdict()}
    others = json.loads((folder / "default.json").read_text())
    assert table["relu2_attention"]["bfloat16"][1:] == others["relu2_attention"]["bfloat16"]
    assert all(table[kernel] == others[kernel] for kernel in others if kernel != "relu2_attention")
    (line,) = (folder / "record.jsonl").read_text().splitlines()
    (large, small) = json.loads(line)["tiles"]
    assert large == [*LARGE, None]
    assert small[:5] == [*SMALL]
    assert small[5] > 0

    monkeypatch.setattr(tune, "candidates", lambda entry: pytest.fail("tuned already"))
    assert run(folder, [entry])
    assert len((folder / "record.jsonl").read_text().splitlines()) == 1


def test_a_run_out_of_time_leaves_a_whole_table(folder, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda entry: [SMALL])
    assert not run(folder, [Entry("targets", "bfloat16", 64, 0)], minutes=0.0)
    assert not list(folder.glob("sm_90*"))
    assert not (folder / "record.jsonl").exists()


def test_entries_are_found_by_the_calls_they_are_for(monkeypatch):
    """Written in any order, read from the narrow and light to the wide and heavy."""
    table = {}
    for width, weight in ((256, 2), (64, 2), (128, 2), (64, 0)):
        tune.place(table, Entry("targets", "bfloat16", width, weight), SMALL._replace(M=width, N=16 + weight))
    tune.place(table, Entry("targets", "bfloat16", 64, 2), SMALL._replace(M=16))
    monkeypatch.setattr(configurations, "_table", lambda name: table)
    for width, weight, expected in ((32, 0, 64), (64, 1, 16), (128, 0, 128), (512, 2, 256)):
        assert expected == configurations._entry.__wrapped__("targets", "sm_0", "bfloat16", width, 64, weight).M


def test_there_are_candidates_for_every_entry():
    wanted = tune.entries(tune.KERNELS, tune.PRODUCTS)
    assert len(wanted) == len(set(wanted)) > 50
    for entry in wanted:
        assert tune.candidates(entry)
        assert tune.calls(entry.kernel, entry.weight)
        assert math.prod(tune.current(entry, "90")[:2]) > 0


def test_a_compiler_that_dies_costs_one_candidate(folder, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda entry: [SMALL])
    monkeypatch.setattr(tune, "current", lambda entry, arch: SMALL)
    monkeypatch.setattr(tune, "predicted", die)
    assert run(folder, [Entry("targets", "bfloat16", 64, 0)])
    assert not list(folder.glob("sm_90*"))


def die(*arguments):
    os._exit(1)


def test_a_line_that_was_cut_off_and_the_time_for_measuring(folder, monkeypatch):
    """A stopped run's last line may be half there; the limit holds also where nothing is left to compile."""
    (folder / "record.jsonl").write_text('{"entry": ["targets", "bfloat16", 64, 0], "off')
    monkeypatch.setattr(tune, "candidates", lambda entry: [SMALL])
    monkeypatch.setattr(tune, "current", lambda entry, arch: SMALL)
    monkeypatch.setattr(tune, "predicted", one)
    clock = iter(range(0, 10**6, 50))  # of tune alone, which looks at it twice a candidate
    monkeypatch.setattr(tune, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    assert not tune.tune(tune.entries(["targets"], ["bfloat16"]), "90", True, folder, folder / "record.jsonl", 1, 400)
    assert len(tune.read(folder / "record.jsonl")) == 4


def one(*arguments):
    return 1.0
