"""The command itself, on the smallest selection."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from bench import results
from bench.cases import quick

ROOT = Path(__file__).parents[2]


def test_measures_what_does_not_stand_in_the_file_yet(tmp_path):
    out = tmp_path / "results.jsonl"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    now = results.circumstances("cpu")
    torch.set_num_threads(threads)
    forward, both = (case for case in quick() if case.op == "relu2_affinity")
    facts = dict.fromkeys(("op", "shape", "dtype", "direction", "backend", "reason"), "") | now
    facts |= dict(yardstick=False, flops=1, peak_flops=1, peak_memory=1, run=1.0)
    stands = [results.row(forward.id, [1.0], {**facts, "peer": peer}) for peer in ("glomo", "authors")]
    results.append(out, stands)

    command = [sys.executable, "-m", "bench", "--device", "cpu", "--threads", "1", "--turns", "2", "--out", str(out)]
    selection = ["-k", "relu2_affinity and (glomo or authors)"]
    # a worker of xdist tells pytest-benchmark by its environment not to measure
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run([*command, *selection], cwd=ROOT, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.read(out)
    assert rows[:2] == stands
    assert [(r["group"], r["extra_info"]["peer"]) for r in rows[2:]] == [(both.id, "glomo"), (both.id, "authors")]
    for r in rows[2:]:
        assert len(r["stats"]["data"]) >= 2
        assert r["extra_info"]["flops"] > 0
        assert r["extra_info"]["peak_flops"] > 1e8
    assert "| authors" in done.stdout
