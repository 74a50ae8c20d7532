"""Tables of attributes: what is read, what is refused, and the one that comes with the package."""

import fnmatch
import sys
from itertools import product
from pathlib import Path

import pytest

from glomo.data import catalogue
from glomo.data.class_attributes import TABLES, read_attributes
from glomo.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.mark.parametrize(("ending", "between"), [("csv", ","), ("tsv", "\t")])
def test_a_table(tmp_path, ending, between):
    path = tmp_path / f"table.{ending}"
    rows = [["class", "flies", " swims "], ["sea gull", "1", " 1"], [], [" cod", "0", "1"]]
    path.write_text("\ufeff" + "\r\n".join(between.join(row) for row in rows) + "\r\n", encoding="utf-8")
    assert read_attributes(str(path)) == (["sea gull", "cod"], ["flies", "swims"], [[1, 1], [0, 1]])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name,flies\ngull,1\n", "the first column is 'name'; 'class' is needed"),
        ("class\ngull\n", "has the column 'class' alone; a column for each attribute is needed"),
        ("class,flies,,swims\ngull,1,1,1\n", "column 3 has no name; every attribute needs one"),
        ("class,flies,swims,flies\ngull,1,1,1\n", "two attributes are called 'flies'; each needs a name of its own"),
        ("class,flies\n", "holds no class: a header row alone is not enough"),
        ("class,flies\ngull,1\n ,0\n", "line 3: the name of the class is blank"),
        ("class,flies\ngull,yes\n", "line 2: the attribute 'flies' of the class 'gull' is 'yes'; 0 or 1 is needed"),
        ("class,flies\ngull,0.5\n", "line 2: the attribute 'flies' of the class 'gull' is '0.5'; 0 or 1 is needed"),
        ("class,flies\ngull,\n", "line 2: the attribute 'flies' of the class 'gull' is ''; 0 or 1 is needed"),
        ("class,flies\ngull,1,0\n", "line 2: 3 fields where the header has 2; they must be equally many"),
        ("", "is empty"),
    ],
)
def test_mistakes(tmp_path, content, sentence):
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"table\.csv.* {sentence}"):
        read_attributes(str(path))


def test_there_is_no_such_table(tmp_path):
    for name, sentence in (
        ("trec", r"there is no table of attributes 'trec'; trec-fine comes with glomo, and a .csv file of your own"),
        (str(tmp_path / "no.csv"), r"no\.csv does not exist; a readable file is needed"),
        (str(tmp_path / "table"), r"table has no extension; a .csv or .tsv file is needed"),
        ("table.json", r"table.json has the extension '.json'; a .csv or .tsv file is needed"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_attributes(name)


def test_trec_fine():
    """Every label that the data set can have, each with a signature of its own; no attribute is of all or of none."""
    classes, attributes, signatures = read_attributes("trec-fine")
    rows = [
        {"label-coarse": str(coarse), "label-fine": str(fine)}
        for coarse, fine in product(range(len(catalogue._TREC)), range(len(catalogue._TREC_FINE)))
    ]
    possible = {catalogue._fine_label(row) for row in rows}
    # coarse classes without an "other" of their own
    assert possible - set(classes) == {"other description", "other abbreviation", "other human"}
    assert set(classes) <= possible
    assert len(classes) == len({tuple(row) for row in signatures}) == 50
    assert classes == sorted(classes)
    assert 20 <= len(attributes) <= 25
    assert all(0 < sum(column) < 50 for column in zip(*signatures, strict=True))
    assert all(any(row) for row in signatures)


def test_the_tables_are_in_the_package():
    project = Path(__file__).parents[3] / "pyproject.toml"
    patterns = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["glomo.data"]
    files = [path.relative_to(TABLES.parent).as_posix() for path in TABLES.iterdir()]
    assert files
    assert all(any(fnmatch.fnmatch(file, pattern) for pattern in patterns) for file in files)
