"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Progress:
    """Report steps with loss, units (tokens) per second and the time left.

    ``seconds`` is the least time between two plain lines; 0 reports nothing at all.
    """

    def __init__(self, title: str, start: int, steps: int, seconds: float) -> None:
        self.title, self.start, self.steps, self.seconds = title, start, steps, seconds
        self._bar: Any = _bar(title, steps, "step", start) if seconds else None
        self._began = self._shown = time.monotonic()
        self._units = 0

    def update(self, step: int, loss: float, units: int) -> None:
        """One step is done, and it read ``units`` units."""
        self._units += units
        if not self.seconds:
            return
        now = time.monotonic()
        rate = self._units / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {_short(rate)} tokens/s", refresh=False)
            self._bar.update(1)
        elif now - self._shown >= self.seconds or step == self.steps:
            self._shown = now
            left = (now - self._began) / (step - self.start) * (self.steps - step)
            print(
                f"{self.title}: step {step}/{self.steps}, loss {loss:.4f}, {_short(rate)} tokens/s, "
                f"{_clock(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def note(self, text: str) -> None:
        """Say something between the steps."""
        if self._bar is not None:
            self._bar.write(f"{self.title}: {text}", file=sys.stderr)
        elif self.seconds:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def track(items: Sequence[T], title: str, unit: str) -> Iterator[T]:
    """The items, with a bar on a terminal."""
    bar = _bar(title, len(items), unit)
    try:
        for item in items:
            yield item
            if bar is not None:
                bar.update(1)
    finally:
        if bar is not None:
            bar.close()


def _bar(title: str, total: int, unit: str, start: int = 0) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:  # plain lines do as well
        return None
    return tqdm(desc=title, initial=start, total=total, unit=unit, dynamic_ncols=True)


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
