"""``glomo data ls`` and ``glomo data fetch NAME...``: the catalogue of open data sets."""

from __future__ import annotations

import difflib

from glomo.errors import UserError

USAGE = """usage: glomo data ls               list the data sets: what, licence, size, whether they are in the cache
       glomo data fetch NAME...    download data sets into the cache (GLOMO_CACHE, else ~/.cache/glomo)"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserError: an unknown subcommand or data set, or a data set that cannot be fetched.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    command, names = argv[0], argv[1:]
    if command not in ("ls", "fetch"):
        nearest = difflib.get_close_matches(command, ("ls", "fetch"), n=1, cutoff=0)[0]
        raise UserError(f"there is no command 'glomo data {command}', perhaps {nearest!r}; there are ls and fetch")
    if command == "ls":
        if names:
            raise UserError(f"glomo data ls takes no further word, but {names[0]!r} was given")
        print(table())
        return 0
    if not names:
        raise UserError("glomo data fetch needs the name of a data set; glomo data ls lists them")
    from glomo.data import catalogue

    for entry in [catalogue.find(name) for name in names]:  # all names are looked up before the first download
        path = catalogue.fetch(entry.name)
        print(f"{entry.notice}\n  {path}")
    return 0


def table() -> str:
    """The catalogue as an aligned table of text."""
    from glomo.data.catalogue import DATASETS

    rows = [("name", "what", "licence", "MB", "package", "cached")]
    for entry in DATASETS.values():
        source = entry.source
        size, cached = f"{source.size / 1e6:.1f}", "yes" if entry.cached else "no"
        rows.append((entry.name, entry.what, entry.licence, size, f"{source.project} {source.version}", cached))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(n) if title == "MB" else cell.ljust(n)
            for title, cell, n in zip(rows[0], row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
