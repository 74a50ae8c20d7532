"""The folder of one run: ``config.toml``, ``metrics.jsonl``, ``checkpoints/``, ``best/`` and ``final/``.

One process at a time may write to it (an advisory lock that dies with its process), and only the run it was made for:
the resolved configuration in ``config.toml`` must be the same, but for the keys that may change between two calls. A
key that it lacks, because the run is older than the key, counts as the key's default.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glomo.errors import UserError
from glomo.training import checkpoint
from glomo.training.config import dump_toml, read_toml

try:
    import fcntl
except ImportError:  # no such locks on Windows: two processes there must mind each other themselves
    fcntl = None  # type: ignore[assignment]

# What may differ when a run is taken up again: how long it goes and what it reports and keeps, not what it computes.
MAY_CHANGE = tuple(f"train.{key}" for key in ("steps", "progress", "checkpoint_every", "keep", "threads", "device"))

# Which section tells what a run is; the first that is there counts.
KINDS = (
    ("run", "one classifier of a transfer run"),
    ("graph", "a transfer run"),
    ("compare", "a comparison"),
    ("study", "a study"),
    ("classifier", "a finetune run"),
    ("rnn", "a translate run"),
    ("lstm", "an lm run"),
    ("model", "a pretrain run"),
)


class RunFolder:
    """An output folder, opened for writing (and locked until `close`, or the end of the process).

    ``config`` is {section: {key: value}}, and so are ``defaults``. Raises UserError when the folder belongs to another
    run, is in use by another process, is full of other things, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Mapping[str, Any]],
        may_change: Iterable[str] = MAY_CHANGE,
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.path = path
        self.checkpoints, self.best, self.final = path / "checkpoints", path / "best", path / "final"
        self.stages = path / "stages"
        self.metrics = path / "metrics.jsonl"
        self._rows: Any = None
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True) if (path / "config.toml").exists() else _claim(path)
            self._lock = (path / ".lock").open("a")
            _lock_or_refuse(self._lock, path)
            _refuse_other_run(path / "config.toml", config, set(may_change), defaults or {})
            self.checkpoints.mkdir(exist_ok=True)
            checkpoint.recover(path)
            checkpoint.recover(self.checkpoints)
            checkpoint.recover(self.stages)
            checkpoint.replace_file(path / "config.toml", dump_toml(config).encode())
        except OSError as error:
            raise UserError(f"cannot write to the output folder {path}: {error.strerror or error}") from error

    def stage_best(self, stage: int) -> Path:
        """Where the best weights of a stage are that goes back to them."""
        return self.stages / f"{stage:02}"

    def prune_stages(self) -> None:
        """Remove the best weights of stages that are behind even the oldest checkpoint."""
        try:
            oldest = checkpoint.step_folders(self.checkpoints)[0]
            reached = json.loads((oldest / checkpoint.META).read_bytes()).get("stage", 0)
        except (IndexError, OSError, ValueError, AttributeError):  # damaged: it may be of any stage
            return
        for stage in range(reached):
            shutil.rmtree(self.stage_best(stage), ignore_errors=True)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; it is in the hands of the operating system before this returns."""
        try:
            if self._rows is None:
                self._rows = self.metrics.open("a", encoding="utf-8")
            self._rows.write(json.dumps(row) + "\n")
            self._rows.flush()
        except OSError as error:
            raise UserError(
                f"cannot write to {self.metrics}: {error.strerror or error}; make room and run the same command again, "
                "what was saved before is whole"
            ) from error

    def drop_rows_after(self, step: int) -> None:
        """Forget the rows past the checkpoint that the run goes on from, and a last line that was cut in the middle.

        Raises UserError when another line is no row.
        """
        if not self.metrics.exists():
            return
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            del lines[-1]
        kept = [line for number, line in enumerate(lines, 1) if self._row(number, line)["step"] <= step]
        checkpoint.replace_file(self.metrics, b"".join(kept))

    def rows(self) -> list[dict[str, Any]]:
        """All rows of ``metrics.jsonl``. Raises UserError when a line is none."""
        return [self._row(number, line) for number, line in enumerate(self.metrics.read_bytes().splitlines(), 1)]

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            raise UserError(
                f"{self.metrics} is damaged: line {number} is no row of figures with a step; remove that line and run "
                "the same command again"
            )
        return row

    def close(self) -> None:
        """Close the files; the lock is free for others after this."""
        if self._rows is not None:
            with contextlib.suppress(OSError):  # a full disk, said already by `log`
                self._rows.close()
            self._rows = None
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _claim(path: Path) -> None:
    """Make the folder, or accept an empty one; hidden files do not count (a start that died early leaves some)."""
    if path.exists() and not path.is_dir():
        raise UserError(f"the output folder {path} is a file; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    others = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if others and others != ["checkpoints"]:
        raise UserError(f"the output folder {path} holds other things ({others[0]}) and no run; choose another --out")


def _lock_or_refuse(file: Any, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing to {path} now; wait for it, or choose another --out") from None
    except OSError:
        pass  # a file system without locks


def _refuse_other_run(
    file: Path,
    config: Mapping[str, Mapping[str, Any]],
    may_change: set[str],
    defaults: Mapping[str, Mapping[str, Any]],
) -> None:
    kept = ("config.toml", "metrics.jsonl", "checkpoints")
    worth = [entry for entry in file.parent.iterdir() if entry.name not in kept and entry.name[0] != "."]
    if not file.exists() or not (worth or checkpoint.step_folders(file.parent / "checkpoints")):
        return  # a run that failed before it saved anything
    saved = read_toml(file)
    for section, content in saved.items():
        if not isinstance(content, dict):
            raise UserError(f"{file} is damaged: {section!r} is no section; choose another --out")
    if _kind(saved) != _kind(config):
        raise UserError(f"the output folder {file.parent} holds {_kind(saved)}; choose another --out")
    new = _flat(config)
    old = {**{key: value for key, value in _flat(defaults).items() if key in new}, **_flat(saved)}
    for key in [*new, *(key for key in old if key not in new)]:
        before, now = ("none" if key in of and of[key] is None else of.get(key) for of in (old, new))
        if before != now and key not in may_change:
            raise UserError(
                f"the output folder {file.parent} holds another run: {key} is {before!r} there and {now!r} in this "
                "call; choose another --out"
            )


def _kind(sections: Mapping[str, Any]) -> str:
    """What a run is, told by the sections of its configuration."""
    return next((kind for section, kind in KINDS if section in sections), "another kind of run")


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, content in sections.items() for key, value in content.items()}
