"""`python -m glomo pretrain`, killed for real."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

HAMLET = Path(__file__).parents[2] / "data" / "hamlet-act-1.txt"
STEPS = 120


def start(out):
    call = [
        *("pretrain", "graph-tiny", "--data.text", str(HAMLET), "--out", str(out), "--train.steps", str(STEPS)),
        *("--model.dim", "16", "--model.head_dim", "8", "--data.length", "24", "--train.threads", "1"),
        *("--train.checkpoint_every", "10", "--train.eval_every", "25", "--train.device", "cpu"),
    ]
    return subprocess.Popen([sys.executable, "-m", "glomo", *call], stderr=subprocess.PIPE, text=True)


def count(file):
    return file.read_bytes().count(b"\n") if file.exists() else 0


def rows(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def kill_after(process, file, step):
    while process.poll() is None and count(file) < step:
        time.sleep(0.001)
    assert process.poll() is None, "ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL


def test_killed_three_times_it_computes_the_same_to_the_last_bit(tmp_path):
    undisturbed = start(tmp_path / "whole")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    chance = random.Random(os.getpid())
    kills = [chance.randint(low, low + 25) for low in (2, 32, 62)]
    for step in kills:
        kill_after(start(tmp_path / "killed"), metrics, step)
    last = start(tmp_path / "killed")
    said = last.communicate(timeout=240)[1]
    assert last.returncode == 0, said
    assert "going on after step" in said
    undisturbed.communicate(timeout=240)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole"), f"killed at {kills}"
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, STEPS + 1))
    for name in ("best", "final"):
        files = [(tmp_path / run / name / "model.safetensors").read_bytes() for run in ("whole", "killed")]
        assert files[0] == files[1]
