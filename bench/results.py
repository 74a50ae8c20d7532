"""The results file: a line of JSON for every peer of every finished case, so that a killed run loses one case at most.

A line is a benchmark as pytest-benchmark writes it (`stats` in seconds); all else the report needs is in `extra_info`.
A peer that could not do a case has `stats: null` and the reason in `extra_info`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.stats import Stats

ROOT = Path(__file__).resolve().parent.parent  # also where bench/ is reached by a link
Row = dict[str, Any]


def device_name(device: str) -> str:
    """The device in words: the GPU's name, or the CPU's with the number of threads."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE)
        model = names[0] if names else model
    return f"{model} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def working_file(name: str) -> Path:
    return ROOT / ".build" / "bench" / f"{slug(name)}.jsonl"


def circumstances(device: str) -> Row:
    """Device, versions, date, commit, and `code`, a digest of the sources that are measured."""
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    return {
        "device": device_name(device),
        "versions": {name: version for name, version in versions.items() if version},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "code": _digest(),
    }


def _commit() -> str:
    """The short hash, with a + where the measured sources are not as committed; empty outside of a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(
            git("status", "--porcelain", "kernels", "csrc", "glomo")
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


def _digest() -> str:
    digest = hashlib.sha256()
    for folder in ("kernels", "csrc", "glomo/nn"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".json"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def row(case: str, seconds: Sequence[float], facts: Row) -> Row:
    """A line of the file: the id of the case, the seconds of every call (none where the peer could not do it, then the
    facts have a `reason`), and what goes into `extra_info`."""
    stats, peer = Stats(), facts["peer"]
    for s in seconds:
        stats.update(s)
    spread = {"p20": percentile(seconds, 0.2), "p80": percentile(seconds, 0.8)} if seconds else {}
    return {
        "group": case,
        "name": f"{case}-{peer}",
        "fullname": f"bench/suite.py::test_peer[{case}-{peer}]",
        "params": {"peer": peer},
        "param": peer,
        "extra_info": {**facts, **spread},
        "options": {},
        "stats": {**stats.as_dict(), "data": list(seconds), "iterations": 1} if seconds else None,
    }


def percentile(values: Iterable[float], share: float) -> float:
    """Linear between the nearest two values."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return ordered[0]
    return statistics.quantiles(ordered, n=100, method="inclusive")[round(100 * share) - 1]


def append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # the last line, by a kill
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_off)
        file.write("".join(json.dumps(r) + "\n" for r in rows))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """All rows of a working file (lines) or of a saved one; a last line that was cut off by a kill is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if path.suffix == ".json":
        saved = json.loads(text)
        return saved["benchmarks"] + saved["not_measured"]
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def latest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group -> the rows of its last run: only what was measured side by side is compared. Op by op, otherwise in the
    order of their first appearance."""
    ops: dict[str, dict[str, dict[float, list[Row]]]] = {}
    for r in rows:
        groups = ops.setdefault(r["extra_info"]["op"], {})
        groups.setdefault(r["group"], {}).setdefault(r["extra_info"]["run"], []).append(r)
    return {group: runs[max(runs)] for groups in ops.values() for group, runs in groups.items()}


def same_circumstances(r: Row, now: Row) -> bool:
    """Whether a row is of this device, these versions and these sources."""
    return all(r["extra_info"][key] == now[key] for key in ("device", "versions", "code"))


def done(rows: Iterable[Row], now: Row) -> set[tuple[str, str]]:
    """(case id, peer) of what need not be measured again."""
    return {(r["group"], r["extra_info"]["peer"]) for r in rows if same_circumstances(r, now)}


def write_saved(path: Path, rows: Sequence[Row]) -> None:
    """A file as pytest-benchmark's `--benchmark-json` writes it (its `compare` reads it), without the single times and
    without the name of the machine; rows without a time are in `not_measured`."""
    slim = [{**r, "stats": {k: v for k, v in r["stats"].items() if k != "data"}} for r in rows if r["stats"]]
    last = rows[-1]["extra_info"]
    content = {
        "machine_info": {"node": "", **{key: last[key] for key in ("device", "versions")}},
        "commit_info": {"id": last["commit"]},
        "benchmarks": slim,
        "not_measured": [r for r in rows if not r["stats"]],
        "datetime": last["date"],
        "version": "",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
