"""Two processes give what one gives, to within rounding; devices that are not there are refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glomo.errors import UserError
from glomo.training.distributed import join

HAMLET = Path(__file__).parents[2] / "data" / "hamlet-act-1.txt"


def command(out, *more):
    return [
        *("-m", "glomo", "pretrain", "graph-tiny", "--data.text", str(HAMLET), "--out", str(out), "--train.steps", "6"),
        *("--model.dim", "16", "--model.head_dim", "8", "--model.positions", "0", "--model.rescue_weight", "0"),
        *("--train.threads", "1", "--train.device", "cpu", "--train.progress", "0", "--train.optimizer", "sgd"),
        *("--train.lr", "0.5", "--train.warmup", "0", "--train.eval_every", "3", "--data.length", "24", *more),
    ]


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


@pytest.mark.skipif(os.name != "posix", reason="gloo over a local socket")
def test_two_processes_train_as_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = {**environment, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [subprocess.Popen([sys.executable, *command(tmp_path / "one")], env=environment)]
    processes += [
        subprocess.Popen([sys.executable, *command(tmp_path / "two")], env={**both, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5, 6]
    for alone, together in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "units", "valid_loss"):
            if name in alone:
                assert together[name] == pytest.approx(alone[name], rel=2e-4), (alone["step"], name)
    assert one[0]["loss"] - one[-1]["loss"] > 0.005  # it did learn
