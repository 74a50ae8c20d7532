"""Tables of classes and what they are like: files of one's own, and those that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from glomo.data.files import read_table
from glomo.errors import UserError

TABLES = Path(__file__).resolve().parent / "attributes"


class ClassAttributes(NamedTuple):
    """Which class has which attribute."""

    classes: list[str]
    attributes: list[str]
    signatures: list[list[float]]
    """a row of 0 and 1 for each class, a column for each attribute"""


def read_attributes(name_or_path: str) -> ClassAttributes:
    """A table of attributes: a .csv or .tsv file whose header is ``class`` and the names of the attributes, with a row
    of 0 and 1 for each class; or one that comes with the package, by its name.

    - trec-fine: 25 attributes of the fifty classes of the data set of that name, written down from the names of the
      classes alone, without a look at the questions. They say what an answer is (``person``, ``living``, ``made`` by
      humans), has (a ``unit``) or is about (``health``); an ``explanation`` takes a sentence.

    Raises:
        UserError: the file cannot be read as a table, there is no such table, the first column is not ``class``, an
            attribute has no name or that of another one, there is no attribute or no class, a class has no name, or a
            value is neither 0 nor 1.
    """
    path = Path(name_or_path)
    if not path.suffix and "/" not in name_or_path:
        path = TABLES / f"{name_or_path}.csv"
        if not path.is_file():
            known = ", ".join(sorted(table.stem for table in TABLES.glob("*.csv")))
            raise UserError(
                f"there is no table of attributes {name_or_path!r}; {known} comes with glomo, and a .csv file of your "
                "own needs its ending"
            )
    header, rows = read_table(path)
    attributes = _checked_header(path, header)
    found = ClassAttributes([], attributes, [])
    for line, (name, *values) in rows:
        if not name.strip():
            raise UserError(f"{path}, line {line}: the name of the class is blank; every row needs one")
        for attribute, value in zip(attributes, values, strict=True):
            if value.strip() not in ("0", "1"):
                raise UserError(
                    f"{path}, line {line}: the attribute {attribute!r} of the class {name.strip()!r} is {value!r}; 0 "
                    "or 1 is needed"
                )
        found.classes.append(name.strip())
        found.signatures.append([float(value) for value in values])
    if not found.classes:
        raise UserError(f"{path} holds no class: a header row alone is not enough, at least one row is needed")
    return found


def _checked_header(path: Path, header: list[str]) -> list[str]:
    """The names of the attributes."""
    first, *attributes = header
    if first != "class":
        raise UserError(f"{path}: the first column is {first!r}; 'class' is needed, and behind it the attributes")
    if not attributes:
        raise UserError(f"{path} has the column 'class' alone; a column for each attribute is needed behind it")
    for place, name in enumerate(attributes):
        if not name:
            raise UserError(f"{path}: column {place + 2} has no name; every attribute needs one")
        if name in attributes[:place]:
            raise UserError(f"{path}: two attributes are called {name!r}; each needs a name of its own")
    return attributes
