"""The low-shot study on a few real texts: which texts each language model is tuned to, and the four ways beside each
other."""

import csv
import json
from pathlib import Path

import pytest

from bench import low_shot
from glomo.cli.main import main

pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
HERE = Path(__file__).parents[1] / "data"
SMALL = ["--train.progress", "0", "--train.device", "cpu"]


def test_a_small_study(tmp_path, capfd):
    train, test = (str(HERE / f"speeches-{part}.csv") for part in ("train", "test"))
    language = ["--lstm.preset", "tiny", "--train.steps", "2", "--train.threads", "1", "--data.text", train]
    general = str(tmp_path / "general")
    assert main(["lm", "train", "lm-lstm-small", "--out", general, *language, *SMALL]) == 0
    out = tmp_path / "out"
    options = ["--data.train", train, "--data.test", test, "--train.steps", "8", "--tune.stage_steps", "1", *SMALL]
    study = ["--general", general, "--target", general, "--out", str(out), "--labels", "20", "0", "--seeds", "1"]
    low_shot.main([*study, "--threads", "1", *options, "--data.length", "20"])
    results = json.loads((out / "runs" / "results.json").read_bytes())
    assert [(row["way"], row["labels"]) for row in results["ways"]] == [
        (way, labels) for labels in (20, 0) for way in ("scratch", "general", "supervised", "semi-supervised")
    ]
    assert (out / "low-shot.png").exists()
    with open(train, newline="", encoding="utf-8") as file:
        texts = [" ".join(row["text"].split()) for row in csv.DictReader(file)]
    read = {name: (out / "lm" / f"{name}-0.txt").read_text(encoding="utf-8").splitlines() for name in ("20", "all")}
    assert read["all"] == texts
    assert len(read["20"]) == 20
    assert set(read["20"]) < set(texts)
    used = (out / "runs" / "supervised-20-0" / "config.toml").read_text()
    assert str(out / "lm" / "20-0") in used
