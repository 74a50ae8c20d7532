"""glomo data ls and glomo data fetch."""

import pytest

from glomo.cli import data
from glomo.data import catalogue
from glomo.errors import UserError


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GLOMO_CACHE", str(tmp_path))
    return tmp_path


def test_ls_shows_every_data_set_with_licence_and_size(capsys, cache):
    source = catalogue.DATASETS["mnist"].source
    (cache / "packages").mkdir()
    (cache / "packages" / source.filename).write_bytes(bytes(source.size))
    assert data.main(["ls"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "what", "licence", "MB", "package", "cached"]
    assert len(rows) == len(catalogue.DATASETS)
    for row, entry in zip(rows, catalogue.DATASETS.values(), strict=True):
        assert row.startswith(entry.name + " ")
        assert entry.licence in row
        assert f" {entry.source.size / 1e6:.1f} " in row
        assert row.endswith("yes" if entry.name == "mnist" else "no")


def test_fetch(monkeypatch, capsys, tmp_path):
    asked = []

    def fetch(name):
        asked.append(name)
        return tmp_path / name

    monkeypatch.setattr(catalogue, "fetch", fetch)
    assert data.main(["fetch", "trec", "glove-50d"]) == 0
    assert asked == ["trec", "glove-50d"]
    out = capsys.readouterr().out
    assert catalogue.DATASETS["glove-50d"].licence in out
    assert str(tmp_path / "trec") in out
    with pytest.raises(UserError, match="perhaps 'trec'"):
        data.main(["fetch", "mnist", "trek"])
    assert asked == ["trec", "glove-50d"]  # nothing is fetched when one name is wrong


@pytest.mark.parametrize(
    ("argv", "found"),
    [(["list"], "there is no command"), (["fetch"], "needs the name"), (["ls", "x"], "no further word")],
)
def test_mistakes(argv, found):
    with pytest.raises(UserError, match=found):
        data.main(argv)


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_usage(argv, capsys):
    assert data.main(argv) == 0
    assert "glomo data fetch NAME" in capsys.readouterr().out
