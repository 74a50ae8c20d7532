"""Plain lines elsewhere, a bar on a terminal, nothing when silent."""

import io
import sys

import pytest

from glomo.training.progress import Progress, _clock, _short, track


def report(seconds):
    progress = Progress("job", 2, 4, seconds)
    progress.note("going on")
    for step in (3, 4):
        progress.update(step, 1.5, 3000)
    progress.close()


def test_plain_lines(capsys):
    report(1e9)  # too seldom for any but the last
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0] == "job: going on"
    assert lines[1].startswith("job: step 4/4, loss 1.5000, ")
    assert lines[1].endswith("k tokens/s, 0:00 left")


def test_silence(capsys):
    report(0)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    report(10)
    assert "job: going on" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()
    assert "loss 1.500" in terminal.getvalue()


def test_items_with_a_bar(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    assert list(track("abc", "job", "letter")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track("abc", "job", "letter")) == ["a", "b", "c"]
    assert "job: 100%" in terminal.getvalue()


def test_numbers_to_read():
    assert [_short(number) for number in (12.4, 999, 1000, 123456)] == ["12", "999", "1.0k", "123.5k"]
    assert [_clock(seconds) for seconds in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
