"""results.json: what came of a run, and what it took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from glomo.training.checkpoint import replace_file
from glomo.training.memory import PeakMemory
from glomo.training.staging import MakeStages, Patterns, Staging

FILE = "results.json"


def write_results(folder: Path, results: Mapping[str, Any], memory: PeakMemory | None) -> dict[str, Any]:
    """Write them into a run's folder, with "memory": bytes at the highest moment, or what a former call has written
    there, None without both. ``memory`` is None where the run was finished before. Returns what was written."""
    kept, taken = folder / FILE, memory.bytes() if memory else None
    if kept.exists():
        taken = json.loads(kept.read_bytes()).get("memory")
    found = {**results, "memory": taken}
    replace_file(kept, (json.dumps(found, indent=1) + "\n").encode())
    return found


def of_last(row: Mapping[str, Any]) -> dict[str, Any]:
    """What results have of the last row of a run's metrics."""
    return {name: row[name] for name in ("valid_loss", "step", "loss", "seconds") if name in row}


def model_sizes(model: nn.Module, patterns: Patterns, stages: MakeStages | None) -> dict[str, int]:
    """{parameters, trainable}: the latter of the stage in which most learn. To be asked before any stage begins."""
    if stages is None:
        return {"parameters": _count(model), "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    return {"parameters": _count(model), "trainable": most_trainable(Staging(model, patterns, stages, validates=True))}


def most_trainable(staging: Staging) -> int:
    """Parameters that learn in the stage in which most do."""
    size = {group.name: group.size for group in staging.groups}
    return max(sum(size[name] for name in stage.rates) for stage in staging.stages)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
