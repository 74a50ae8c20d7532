"""How much memory a run takes at its peak."""

from __future__ import annotations

from pathlib import Path

import torch


class PeakMemory:
    """Bytes above what was there when it was made, at the highest moment since; None where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from the present level
            self._before = _resident("VmRSS")
        except OSError:  # not Linux, or a container that forbids it
            self._before = -1

    def bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return None if self._before < 0 else max(0, _resident("VmHWM") - self._before)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
