import json

import pytest

from bench import report, results
from bench.cases import Case

NOW = {
    "device": "A CPU, 2 threads",
    "versions": {"torch": "2"},
    "date": "2026-01-02 03:04 UTC",
    "commit": "c",
    "code": "d",
}


def row(case, peer, milliseconds, run=1.0, reason="", yardstick=False, memory=2_000_000, **facts):
    fields = {name: getattr(case, name) for name in ("op", "shape", "dtype", "direction", "length", "clusters")}
    return results.row(
        case.id,
        [m / 1000 for m in milliseconds],
        {
            **fields,
            **NOW,
            "peer": peer,
            "backend": "blocked" if peer == "glomo" else "",
            "yardstick": yardstick,
            "reason": reason,
            "flops": 10**9,
            "bytes": 1,
            "peak_memory": memory,
            "peak_flops": 1e12,
            "run": run,
            **facts,
        },
    )


@pytest.fixture
def rows():
    found = []
    for length in (64, 128):
        case = Case("relu2_attention", batch=2, heads=1, length=length)
        found += [
            row(case, "glomo", [9, 10, 11]),
            row(case, "eager", [30, 30, 30], memory=8_000_000),
            row(case, "compile", [19, 20, 21]),
            row(case, "SDPA flash", [5, 5, 5], yardstick=True),
            row(case, "flex", [], reason="no backward on CPU"),
        ]
    return found


def cells(text, *words):
    line = next(line for line in text.splitlines() if all(word in line for word in words))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table(rows):
    text = report.table(rows)
    assert "A CPU, 2 threads; torch 2; commit c; 2026-01-02" in text
    assert cells(text, "T64", "glomo (blocked)")[2:] == ["1.00x", "10 (9-11)", "100", "10 %", "2"]
    assert cells(text, "T64", "eager")[2:] == ["3.00x", "30 (30-30)", "33", "3 %", "8"]
    assert cells(text, "T64", "flex")[2:4] == ["-", "no backward on CPU"]


def test_summary_takes_the_best_peer_that_computes_the_same(rows):
    assert cells(report.summary(rows), "T128")[1:] == [
        *("blocked", "compile", "2.00x", "3.00x", "10 (9-11)", "10 %", "2 / 2"),
    ]


def test_only_times_of_one_run_are_compared(rows):
    case = Case("relu2_attention", batch=2, heads=1, length=64)
    later = [row(case, "glomo", [40], run=2.0), row(case, "eager", [20], run=2.0)]
    assert cells(report.summary(rows + later), "T64")[2:5] == ["eager", "0.50x", "0.50x"]


def test_a_case_without_ours_is_said_so(rows):
    case = Case("attention", batch=2, heads=1, length=64)
    failed = [row(case, "glomo", [], reason="a bug"), row(case, "eager", [20])]
    assert cells(report.summary(failed), "attention")[1] == "not measured"
    assert cells(report.table(failed), "eager")[2] == "-"


def test_save_and_read_again(rows, tmp_path):
    files = report.save(rows, tmp_path)
    names = {path.name.removeprefix("a-cpu-2-threads") for path in files}
    assert names == {".json", ".md", "-speed.png", "-memory.png", "-ratios.png"}
    assert all(path.stat().st_size > 0 for path in files)
    assert report.summary(results.read(files[0])) == report.summary(rows)
    saved = json.loads(files[0].read_text())
    assert [b["stats"]["median"] for b in saved["benchmarks"][:2]] == [0.01, 0.03]
    assert [r["extra_info"]["reason"] for r in saved["not_measured"]] == ["no backward on CPU"] * 2


def test_a_file_cut_off_by_a_kill(rows, tmp_path):
    path = tmp_path / "working.jsonl"
    results.append(path, rows[:3])
    path.write_text(path.read_text()[:-20])
    assert results.read(path) == rows[:2]
    assert results.done(results.read(path), NOW) == {(r["group"], r["extra_info"]["peer"]) for r in rows[:2]}
    assert not results.done(results.read(path), {**NOW, "code": "changed"})
    assert results.read(tmp_path / "none.jsonl") == []
