"""Checkpoints: folders that are whole or not there, checked by sha256, read without unpickling anything.

A checkpoint is a folder of up to three files: ``model.safetensors`` (the weights), ``train_state.pt`` (everything
else that an exact resume needs; read with ``weights_only=True``) and ``meta.json`` (format, step, configuration,
vocabulary, and the sha256 of the other two). It is written under a temporary name in the same parent folder, flushed
to the disk, and renamed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from glomo.errors import UserError
from glomo.transfer.signal import uniform_soup

FORMAT = 1
WEIGHTS, STATE, META = "model.safetensors", "train_state.pt", "meta.json"
TEMPORARY = ".tmp-"  # prefix of what is not whole yet


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds. ``weights`` is a state_dict, ``state`` is None in a folder saved without one."""

    folder: Path
    weights: dict[str, Tensor]
    state: dict[str, Any] | None
    meta: dict[str, Any]


def save(folder: Path, weights: Mapping[str, Tensor], state: dict[str, Any] | None, meta: Mapping[str, Any]) -> None:
    """Write a checkpoint folder, replacing one of the same name; afterwards it is there in full or as it was before.

    ``meta`` must be plain JSON. Raises UserError when the disk refuses (full, read-only, ...).
    """
    temporary = folder.parent / f"{TEMPORARY}{folder.name}"
    old = folder.parent / f"{TEMPORARY}old-{folder.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors, tied = _untie(weights)
        files = {WEIGHTS: safetensors.torch.save(tensors)}
        if state is not None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            files[STATE] = buffer.getvalue()
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        files[META] = json.dumps({"format": FORMAT, **meta, "tied": tied, "sha256": sums}, indent=1).encode()
        for name, data in files.items():
            write_file(temporary / name, data)
        sync_folder(temporary)
        if folder.exists():  # a folder cannot be renamed over a full one: `recover` mends a death between these two
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(folder.parent)
        raise UserError(
            f"cannot save {folder}: {error.strerror or error}; make room and run the same command again, "
            "what was saved before is whole"
        ) from error


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint folder and check it. Raises UserError naming the file that is missing, cut or changed."""
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {folder}")
    try:
        meta = json.loads((folder / META).read_bytes())
        sums = dict(meta["sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is not a whole checkpoint: {META} is missing, cut or changed") from None
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder} has checkpoint format {meta.get('format')!r}, this version reads {FORMAT}")
    data: dict[str, bytes] = {}
    for name in (WEIGHTS, STATE):
        if name not in sums and name == STATE:
            continue
        try:
            data[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{folder} is not a whole checkpoint: {name} is missing") from None
        found = hashlib.sha256(data[name]).hexdigest()
        if found != sums.get(name):
            raise UserError(
                f"{folder} is not a whole checkpoint: {name} ({len(data[name])} bytes) is cut or changed, its sha256 "
                f"is {found[:12]} and {META} says {str(sums.get(name))[:12]}"
            )
    try:
        weights = safetensors.torch.load(data[WEIGHTS])
        weights.update({name: weights[first] for name, first in meta.get("tied", {}).items()})
        state = torch.load(io.BytesIO(data[STATE]), map_location="cpu", weights_only=True) if STATE in data else None
    except pickle.UnpicklingError:
        raise UserError(f"{folder / STATE} holds more than tensors and plain values, and is not read") from None
    except (safetensors.SafetensorError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} is damaged: its files do not fit together ({str(error)[:200]}); use another checkpoint, or make "
            "it again"
        ) from None
    return Checkpoint(folder, weights, state, meta)


def latest(parent: Path) -> Checkpoint | None:
    """The newest whole checkpoint among ``parent/step-*``, or None when there is none at all.

    A damaged one is passed over with a sentence on stderr when an older whole one exists; otherwise UserError.
    """
    complaint: UserError | None = None
    for folder in reversed(step_folders(parent)):
        try:
            found = load(folder)
        except UserError as error:
            complaint = complaint or error
            continue
        if complaint:
            print(f"glomo: {complaint}; going back to {folder.name}", file=sys.stderr)
        return found
    if complaint:
        raise UserError(f"{complaint}; no older one is whole, remove {parent} to start again")
    return None


def average(folders: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the floating weights of several checkpoints of one model, taken in fp64; other tensors of the last.

    Raises UserError when they are not of one model, or one is not whole.
    """
    found = [load(folder).weights for folder in folders]
    for folder, weights in zip(folders, found, strict=True):
        if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in found[-1].items()}:
            raise UserError(f"{folder} and {folders[-1]} hold weights of different models, which have no mean")
    return uniform_soup(found)


def step_folders(parent: Path) -> list[Path]:
    """The ``step-000800`` folders of ``parent``, oldest first."""
    found = [path for path in parent.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def prune(parent: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` step folders (each renamed first: no half-removed one is ever seen)."""
    for folder in step_folders(parent)[:-keep]:
        doomed = parent / f"{TEMPORARY}old-{folder.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def recover(parent: Path) -> None:
    """Tidy what a death in the middle of `save` left: put back a replaced folder, drop half-written ones."""
    for leftover in parent.glob(f"{TEMPORARY}*"):
        name = leftover.name[len(TEMPORARY) :]
        if name.startswith("old-") and not (parent / name[4:]).exists() and not name.startswith("old-step-"):
            leftover.rename(parent / name[4:])
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Write and flush to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write ``path`` so that a reader, or a death at any moment, sees the old content or the new one, never a part."""
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    write_file(temporary, data)
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut. A no-op where folders cannot be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _untie(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous CPU tensors, each once, and {name: the name it shares with} (safetensors refuses shared ones)."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in weights.items():
        view = (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and view in seen:
            tied[name] = seen[view]
            continue
        seen[view] = name
        # clone: two different views into one storage would still count as shared
        tensors[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    return tensors, tied
