"""Users' own files: unlabelled texts, labelled examples and sentence pairs out of .txt, .csv, .tsv and .jsonl.

- ``.txt``: one text per line that is not blank.
- ``.csv``: a header row, then rows, as in RFC 4180: a quoted field may hold commas, doubled quotes and line ends.
- ``.tsv``: a header row, then one row a line; a tab always separates and a quote is an ordinary character.
- ``.jsonl``: one JSON object a line.

Files are UTF-8, with or without a byte order mark, with any line ends. Whatever is wrong with a file raises a
:class:`glomo.errors.UserError` that names the file, the place and what is needed: a row is never dropped or cut
silently.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from glomo.errors import UserError

PathLike = str | os.PathLike[str]


def read_texts(path: PathLike, column: str = "text") -> list[str]:
    """Read the unlabelled texts of a file, in file order; blank texts are left out.

    Args:
        path: a .txt, .csv, .tsv or .jsonl file.
        column: the column (key of the JSON objects) that holds the text; a .txt file has none and ignores it.

    Raises:
        UserError: the file cannot be read, is not UTF-8, lacks the column, is broken at a line, or holds no text.
    """
    path = _checked(path, (".txt", ".csv", ".tsv", ".jsonl"))
    content = _decode(path)
    if path.suffix.lower() == ".txt":
        texts = [line.strip() for line in _lines(content)]
    else:
        texts = [row[0].strip() for _, row in _rows(path, content, (column,))]
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"{path} holds no text: every line or field in it is blank, and at least one text is needed")
    return texts


def read_labelled(path: PathLike, text_column: str = "text", label_column: str = "label") -> list[tuple[str, str]]:
    """Read labelled examples ``(text, label)``, in file order; labels are strings.

    A label that is a JSON number or boolean is taken as JSON writes it.

    Raises:
        UserError: as :func:`read_texts`; also a blank text or label, with its line.
    """
    return [(text, label) for text, label in _read_columns(path, (text_column, label_column), "a text and a label")]


def read_pairs(path: PathLike, source_column: str = "source", target_column: str = "target") -> list[tuple[str, str]]:
    """Read sentence pairs ``(source, target)``, in file order, from a .csv, .tsv or .jsonl file with these columns.

    Raises:
        UserError: as :func:`read_texts`; also a blank side, with its line.
    """
    columns = (source_column, target_column)
    return [(source, target) for source, target in _read_columns(path, columns, "a source and a target")]


def read_labelled_pairs(
    path: PathLike, text_column: str = "text", pair_column: str = "pair", label_column: str = "label"
) -> list[tuple[str, str, str]]:
    """Read labelled pairs of texts ``(text, second text, label)``, in file order.

    Raises:
        UserError: as :func:`read_labelled`.
    """
    columns = (text_column, pair_column, label_column)
    return [(first, second, label) for first, second, label in _read_columns(path, columns, "two texts and a label")]


def read_table(path: PathLike) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Read a .csv or .tsv file whose columns its reader does not know: (the header, the rows, each behind the number of
    its line).

    Raises:
        UserError: as :func:`read_texts`.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".csv", ".tsv"):
        kind = f"the extension {path.suffix!r}" if path.suffix else "no extension"
        raise UserError(f"{path} has {kind}; a .csv or .tsv file is needed")
    header, rows = _table(path, _decode(path))
    return header, list(rows)


def _read_columns(path: PathLike, columns: tuple[str, ...], needed: str) -> list[tuple[str, ...]]:
    path = _checked(path, (".csv", ".tsv", ".jsonl"))
    examples = []
    for line, values in _rows(path, _decode(path), columns):
        for column, value in zip(columns, values, strict=True):
            if not value.strip():
                raise UserError(f"{path}, line {line}: the field {column!r} is blank, but every example needs {needed}")
        examples.append(tuple(value.strip() for value in values))
    if not examples:
        raise UserError(f"{path} holds no example: a header row alone is not enough, at least one row is needed")
    return examples


def label_names(examples: Iterable[tuple[str, str]]) -> list[str]:
    """The distinct labels of ``(text, label)`` examples, sorted.

    Raises:
        UserError: fewer than two classes, with which no classifier can be trained.
    """
    names = sorted({label for _, label in examples})
    if len(names) < 2:
        found = f"one class only, {names[0]!r}" if names else "no example"
        raise UserError(f"the labelled examples hold {found}; at least two classes are needed")
    return names


def encode_labels(labels: Iterable[str], names: Sequence[str]) -> list[int]:
    """The index of every label in ``names``.

    Raises:
        UserError: a label that is not among ``names``; the message says the nearest one.
    """
    index = {name: i for i, name in enumerate(names)}
    codes = []
    for label in labels:
        if label not in index:
            raise UserError(f"the label {label!r} is unknown; the known labels are {_listed(label, names)}")
        codes.append(index[label])
    return codes


def _checked(path: PathLike, extensions: tuple[str, ...]) -> Path:
    path = Path(path).expanduser()
    wanted = ", ".join(extensions[:-1]) + " or " + extensions[-1]
    if path.suffix.lower() not in extensions:
        if path.suffix.lower() == ".txt":
            raise UserError(
                f"{path} is plain text and has no labels; a {wanted} file with a text and a label column is needed"
            )
        kind = f"the extension {path.suffix!r}" if path.suffix else "no extension"
        raise UserError(f"{path} has {kind}, and its format is unknown; a {wanted} file is needed")
    return path


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a readable file is needed") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a file is needed") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); a readable file is needed") from None
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        content = data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start + mark
        raise UserError(
            f"{path} is not UTF-8: byte {data[place]:#04x} at offset {place} does not belong there; save the file as "
            "UTF-8"
        ) from None
    if not content.strip():
        raise UserError(f"{path} is empty; at least one text is needed")
    return content


def _lines(content: str) -> list[str]:
    # str.splitlines would also split at U+2028 and other characters that are legal inside a line (and inside JSON
    # strings).
    return content.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _rows(path: Path, content: str, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, the values of the columns) for every row that is not blank."""
    if path.suffix.lower() == ".jsonl":
        yield from _json_rows(path, content, columns)
        return
    header, rows = _table(path, content)
    for column in columns:
        if column not in header:
            raise _no_column(path, column, header)
    places = [header.index(column) for column in columns]
    for line, row in rows:
        yield line, [row[place] for place in places]


def _table(path: Path, content: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """(the header, (line number, fields) of every row that is not blank), of a .csv or .tsv file."""
    is_csv = path.suffix.lower() == ".csv"
    reader = _csv_rows(path, content) if is_csv else _tsv_rows(content)
    _, header = next(reader)
    return [name.strip() for name in header], _as_long(path, reader, len(header), is_csv)


def _as_long(
    path: Path, rows: Iterator[tuple[int, list[str]]], length: int, is_csv: bool
) -> Iterator[tuple[int, list[str]]]:
    """The rows, each of them with as many fields as the header."""
    for line, row in rows:
        if len(row) != length:
            hint = ", and a text with a comma or a line end needs quotes" if is_csv else ""
            raise UserError(
                f"{path}, line {line}: {len(row)} fields where the header has {length}; they must be equally many{hint}"
            )
        yield line, row


def _csv_rows(path: Path, content: str) -> Iterator[tuple[int, list[str]]]:
    # strict: an unclosed quote would otherwise swallow the rest of the file into one field.
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    previous_limit = csv.field_size_limit(sys.maxsize)
    try:
        line = 1
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: not well-formed CSV ({error}); quotes must be closed and doubled inside "
            "a field"
        ) from None
    finally:
        csv.field_size_limit(previous_limit)


def _tsv_rows(content: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(_lines(content), 1):
        if line.strip():
            yield number, line.split("\t")


def _json_rows(path: Path, content: str, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(_lines(content), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not valid JSON ({error}); one JSON object a line is needed"
            ) from None
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number}: a JSON {type(record).__name__} where one JSON object a line is needed"
            )
        values = []
        for column in columns:
            if column not in record:
                raise _no_column(path, column, list(record), line=number)
            value = record[column]
            if isinstance(value, (int, float)):
                value = json.dumps(value)
            if not isinstance(value, str):
                raise UserError(
                    f"{path}, line {number}: {column!r} is {json.dumps(value)[:40]}, where a string is needed"
                )
            values.append(value)
        yield number, values


def _no_column(path: Path, column: str, found: list[str], line: int | None = None) -> UserError:
    place = f", line {line}: no" if line else " has no"
    there = f"the columns there are: {_listed(column, found)}" if found else "there are no columns at all"
    return UserError(f"{path}{place} column {column!r}; {there}")


def _listed(wanted: str, names: Sequence[str], most: int = 6) -> str:
    """The names, the one most like the wanted one first, cut to a readable length."""

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, wanted.lower(), name.lower()[:80]).ratio()

    ordered = sorted(names, key=likeness, reverse=True)
    shown = ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in ordered[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
