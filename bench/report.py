"""`python -m bench.report FILE... [--save]`: Markdown tables and pictures of results files.

Ratios of medians of one run come first, absolute times second. A ratio is a peer's time over ours: above 1 ours is
faster.
FLOP/s count the matrix products only (bench/flops.py), the share is of the peak that was measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.results import Row

OURS = "glomo"
Rows = Sequence[Row]


def info(r: Row, key: str) -> Any:
    return r["extra_info"][key]


def measured(rows: Rows) -> dict[str, Row]:
    """Peer -> row, of those that have a time."""
    return {info(r, "peer"): r for r in rows if r["stats"]}


def ratio(r: Row, ours: Row) -> float:
    return r["stats"]["median"] / ours["stats"]["median"]


def best_peer(rows: Rows) -> Row | None:
    """The fastest peer that computes the same thing."""
    others = [r for peer, r in measured(rows).items() if peer != OURS and not info(r, "yardstick")]
    return min(others, key=lambda r: r["stats"]["median"], default=None)


def flops_per_second(r: Row) -> float:
    return info(r, "flops") / r["stats"]["median"]


def case_name(r: Row) -> str:
    return " ".join(info(r, key) for key in ("op", "shape", "dtype", "direction"))


def label(r: Row) -> str:
    backend = info(r, "backend")
    name = f"{OURS} ({backend})" if info(r, "peer") == OURS else info(r, "peer")
    return name + " *" * info(r, "yardstick")


def circumstances(rows: Rows) -> str:
    """Device, versions and date in one line."""
    found = sorted(
        {
            (info(r, "device"), ", ".join(f"{k} {v}" for k, v in info(r, "versions").items()), info(r, "commit"))
            for r in rows
        }
    )
    dates = sorted({info(r, "date")[:10] for r in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return "; ".join(f"{d}; {v}" + f"; commit {c}" * bool(c) for d, v, c in found) + f"; {when}"


def table(rows: Rows) -> str:
    """One row for every peer of every case; a peer that could not do a case says why."""
    head = ("case", "peer", "peer / ours", "median ms (p20-p80)", "GFLOP/s", "of peak", "memory MB")
    body = []
    for group in results.latest(rows).values():
        ours = measured(group).get(OURS)
        for r in group:
            body.append((case_name(r), label(r), *_cells(r, ours)))
    note = "\\* softmax attention on the same tensors: another function, a yardstick for the time.\n"
    return f"{circumstances(rows)}\n\n{markdown(head, body)}" + f"\n{note}" * any(info(r, "yardstick") for r in rows)


def _cells(r: Row, ours: Row | None) -> tuple[str, ...]:
    if not r["stats"]:
        return "-", info(r, "reason"), "", "", ""
    speed = flops_per_second(r)
    return (
        f"{ratio(r, ours):.2f}x" if ours else "-",
        _milliseconds(r),
        f"{speed / 1e9:.0f}" if speed else "-",
        f"{100 * speed / info(r, 'peak_flops'):.0f} %" if speed else "-",
        _megabytes(r),
    )


def _milliseconds(r: Row) -> str:
    values = [1e3 * v for v in (r["stats"]["median"], info(r, "p20"), info(r, "p80"))]
    digits = max(0, 2 - len(str(int(values[0])))) if values[0] >= 1 else 3
    return "{:.{d}f} ({:.{d}f}-{:.{d}f})".format(*values, d=digits)


def _megabytes(r: Row) -> str:
    memory = info(r, "peak_memory")
    return "-" if memory is None else f"{memory / 1e6:.0f}"


def summary(rows: Rows) -> str:
    """One row for every case: ours against the best peer and against the eager formula."""
    head = ("case", "backend", "best peer", "best / ours", "eager / ours", "ms (p20-p80)", "of peak", "MB, ours / best")
    body = []
    for group in results.latest(rows).values():
        found = measured(group)
        ours, best = found.get(OURS), best_peer(group)
        if ours is None:
            body.append((case_name(group[0]), "not measured", *[""] * 6))
            continue
        eager = found.get("eager")
        cells = _cells(ours, ours)
        body.append(
            (
                case_name(ours),
                info(ours, "backend"),
                label(best) if best else "none",
                f"{ratio(best, ours):.2f}x" if best else "-",
                f"{ratio(eager, ours):.2f}x" if eager else "-",
                cells[1],
                cells[3],
                f"{_megabytes(ours)} / {_megabytes(best) if best else '-'}",
            )
        )
    return markdown(head, body)


def case_line(rows: Rows) -> str:
    """A finished case in one line, for the terminal."""
    ours, best = measured(rows).get(OURS), best_peer(rows)
    if ours is None:
        return f"{case_name(rows[0])}: {len(measured(rows))} peers measured, {OURS} not"
    against = f"; {label(best)} {ratio(best, ours):.2f}x" if best else ""
    return f"{case_name(ours)}: {label(ours)} {_milliseconds(ours)} ms{against}"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned for the terminal too."""
    lines = [list(head), *(list(cells) for cells in body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def save(rows: Rows, folder: Path) -> list[Path]:
    """<device>.json, <device>.md and the pictures in the folder. The rows are of one device."""
    from bench.pictures import draw

    rows = [r for group in results.latest(rows).values() for r in group]
    name = results.slug(info(rows[0], "device"))
    results.write_saved(folder / f"{name}.json", rows)
    pictures = draw(rows, folder, name)
    links = "\n".join(f"![]({path.name})" for path in pictures)
    text = f"# {info(rows[0], 'device')}\n\n{summary(rows)}\n\n{links}\n\n## Every peer\n\n{table(rows)}\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return [folder / f"{name}.json", folder / f"{name}.md", *pictures]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--save", action="store_true", help="write JSON, table and pictures to bench/results/")
    options = parser.parse_args()
    rows = [r for path in options.files for r in results.read(path)]
    for device in sorted({info(r, "device") for r in rows}):
        own = [r for r in rows if info(r, "device") == device]
        print(f"{table(own)}\n\n{summary(own)}\n")
        if options.save:
            print(*save(own, results.ROOT / "bench" / "results"), sep="\n")


if __name__ == "__main__":
    main()
