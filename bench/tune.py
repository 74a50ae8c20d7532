"""Chooses the tile shapes of the Triton kernels and writes them to kernels/tuned: `python -m bench.tune [--offline 90]
[--kernel targets ...] [--products bfloat16 ...]`.

An entry is the best candidate for a kernel, its products, a width and the weight of a call (see
glomo.kernels.configurations). Candidates compile in processes of their own, for every kind of call of that weight; one
that spills anywhere is out. On a GPU the others are timed, on a long and a short case; `--offline ARCH` goes by what
`bench.codegen` predicts from the machine code instead. Every entry is in the table as soon as it is found, and every
candidate's cost in bench/results/tiles-*.jsonl: a run that was stopped goes on with the entries that are not there.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.codegen import CALLS, Case, examine, launches, mix, products, relate, table_name
from bench.results import ROOT, append, circumstances, read, slug
from glomo.kernels import configurations
from glomo.kernels.configurations import Configuration
from glomo.kernels.launch import Launch

TUNED = Path(configurations.__file__).parent / "tuned"
KERNELS = {
    "relu2_attention": "forward_kernel",
    "targets": "targets_kernel",
    "sources": "sources_kernel",
    "pairs": "pairs_kernel",
    "attention": "forward_kernel",
    "attention_targets": "targets_kernel",
    "attention_sources": "sources_kernel",
    "attention_pairs": "pairs_kernel",
    "mix": "mixed_kernel",
    "mix_each": "graph_by_graph_kernel",
    "mix_features": "features_kernel",
    "mix_moments": "moments_kernel",
    "affinity_targets": "targets_kernel",
    "affinity_sources": "sources_kernel",
    "relu2_affinity": "affinity_kernel",
}
PRODUCTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
WIDTHS = (64, 128, 256)
SUMS = {64: (64, 128, 256, 320, 512), 256: (512,)}
"""Widths of the features by the width of the query for the kernels that hold sums of them beside a whole loop over
graphs: a chunk more repeats that loop."""
L2_BYTES = 25.0
"""What a multiprocessor of an H200 gets from the second-level cache in a clock: 5.8 TB/s in all, an estimate."""

Run = Callable[[Case], None]

RELU2 = [
    ["plain"],
    ["glomo: strictly causal, bias per target", "packed"],
    ["full bias", "bias per source, padding mask", "dropout", "skipping tiles"],
]
"""Calls of weight 0, 1 and 2 (names of bench.codegen.CALLS)."""
SOFTMAX = [
    ["softmax"],
    ["softmax, causal", "softmax, packed"],
    ["softmax, float mask", "softmax, padding mask", "softmax, dropout"],
]


def mixes(kernel: str, weight: int) -> list[Run]:
    """The same for a kernel of mixtures."""
    kinds: list[dict[str, Any]] = [dict(bias="row", diagonal=-1)]
    if weight == 2:
        kinds = [dict(bias="row", diagonal=-1, mixtures=2, per_target=True), dict(bias="full", mask="column")]

    def run(case: Case, kind: dict[str, Any]) -> None:
        sums = kind.get("mixtures", 1) if kernel in ("mix", "mix_each") else 1  # as many as columns have room for
        mix(case._replace(features=max(case.features // sums, 16)), sums_first=kernel != "mix_each", **kind)

    return [functools.partial(run, kind=kind) for kind in kinds]


def calls(kernel: str, weight: int) -> list[Run]:
    """The kinds of call of a weight that launch the kernel."""
    if kernel.startswith("mix"):
        return mixes(kernel, weight)
    graphs: list[Run] = [
        lambda c: relate(c, None, None),
        relate,
        lambda c: relate(c, "full", -1),
    ]
    if "affinity" in kernel:
        return [graphs[weight]]
    attention = [CALLS[name] for name in (SOFTMAX if kernel.startswith("attention") else RELU2)[weight]]
    if kernel == "pairs":
        return [attention[0], graphs[2]]
    return attention[:1] if kernel == "attention_pairs" else attention


class Entry(NamedTuple):
    """A place in a table of tile shapes."""

    kernel: str
    products: str
    width: int
    weight: int
    query: int | None = None  # its width, where that differs

    def case(self, run: Run, device: str = "meta", heads: int = 32, size: int = 512) -> Case:
        return Case("tuning", PRODUCTS[self.products], self.query or self.width, self.width, run, device, heads, size)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """TF32 products or not."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.products == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def current(entry: Entry, arch: str) -> Configuration:
    """The shipped tile shape."""
    widths = entry.query or entry.width, entry.width
    return configurations._entry(entry.kernel, table_name(arch), entry.products, *widths, entry.weight)


def candidates(entry: Entry) -> list[Configuration]:
    """Tile shapes worth a try, from large to small."""
    kernel, dtype, width = entry.kernel, PRODUCTS[entry.products], entry.width
    role = KERNELS[kernel]
    features = [width]
    if entry.query is not None:
        features = [f for f in (512, 320, 256, 128, 64) if f <= width]
    elif width == 256:
        features = [128, 64] if role != "forward_kernel" else [256, 128]
    shapes: list[tuple[int, int, int]]
    if dtype == torch.float32:
        shapes = [(64, 64, 8), (64, 32, 4), (64, 32, 8), (64, 32, 16), (32, 64, 4), (32, 32, 8), (32, 32, 4)]
    elif role in ("sources_kernel", "pairs_kernel", "features_kernel"):
        shapes = [(64, 128, 8), (64, 64, 4), (32, 128, 8), (32, 64, 4), (64, 64, 8), (32, 64, 8)]
    elif role == "mixed_kernel":
        shapes = [(128, 128, 8), (64, 128, 8), (128, 64, 8), (64, 64, 8), (64, 64, 4), (64, 32, 8)]
    else:
        shapes = [(128, 128, 8), (128, 64, 4), (64, 64, 4), (128, 64, 8), (64, 32, 4), (64, 32, 8)]
    if width == 256 and not kernel.startswith("mix"):
        shapes = [shape for shape in shapes if shape[0] * shape[1] <= 64 * 64]
    stages = [2] if dtype != torch.float32 else [1]
    return [Configuration(m, n, f, w, s) for m, n, w in shapes for f in features for s in stages]


def with_configuration(kernel: str, tile: Configuration, case: Case, architecture: str) -> list[Launch]:
    """The kernel's launches in a case, with this tile shape."""
    original = configurations._entry

    def entry(name, arch, dtype, width, features, weight):
        if name == kernel:
            return tile._replace(features=min(features, tile.features))
        return original(name, arch, dtype, width, features, weight)

    with mock.patch.object(configurations, "_entry", entry):
        found = launches(case, architecture)
    return [launch for launch in found if launch.kernel.__name__ == KERNELS[kernel]]


def predicted(entry: Entry, tile: Configuration, arch: str) -> float:
    """Clocks per pair and column of a product, by the machine code; infinite where a call does not compile cleanly."""
    cost = math.inf
    with entry.precision():
        for run in calls(entry.kernel, entry.weight):
            for launch in with_configuration(entry.kernel, tile, entry.case(run), table_name(arch)):
                try:
                    report = examine(launch, arch)
                except OSError:  # no compiler, no room for its cache: nothing about the tile
                    raise
                except Exception:
                    return math.inf
                if report.problems:
                    return math.inf
                work = tile.M * tile.N * products(launch)
                t, c, chunks = report.tensor_clocks, report.issue_clocks, 1
                if entry.query is not None:  # each chunk of the features begins anew
                    chunks = -(-launch.constants["FEATURES"] // (launch.constants["F"] + launch.constants["G"]))
                if math.isinf(cost):  # the first kind of call decides; several blocks overlap each other's clocks
                    cost = chunks * (max(t, c, (t + c) / report.blocks, copied(launch)) + 0.1 * (t + c)) / work
                if not t:  # no tensor cores in sight: larger tiles, then more blocks
                    cost = 10.0 / (tile.M * tile.N * min(report.blocks, 2))
    return cost


def copied(launch: Launch) -> float:
    """Clocks that a tile's operands take from the second-level cache where a loop over graphs loads both anew."""
    if launch.kernel.__name__ not in ("mixed_kernel", "features_kernel", "moments_kernel"):
        return 0.0
    c = launch.constants
    size = next(iter(launch.arguments.values())).pointer.element_size()
    return (c["M"] + c["N"]) * c["E"] * size / L2_BYTES


def measured(entry: Entry, tile: Configuration, arch: str) -> float:
    """Time of the kernel's first kind of call on the GPU at hand: milliseconds of a long and of a short case,
    multiplied."""
    from triton.testing import do_bench

    run = calls(entry.kernel, entry.weight)[0]
    cost = 1.0
    with entry.precision():
        for heads, size in ((16, 4096), (512, 256)):
            timed = with_configuration(entry.kernel, tile, entry.case(run, "cuda", heads, size), table_name(arch))
            cost *= do_bench(lambda timed=timed: [launch.run() for launch in timed])  # type: ignore[misc]
    return cost


def entries(kernels: Iterable[str], names: Iterable[str]) -> list[Entry]:
    """What a table holds; what is heavy or slow anyway gets one entry for all weights."""
    found = []
    for kernel in kernels:
        for name in names:
            if kernel in ("mix", "mix_features"):
                pairs = [(width, query) for query, widths in SUMS.items() for width in widths]
                found += [
                    Entry(kernel, name, width, weight, query)
                    for width, query in (pairs if name != "float32" else pairs[:1])
                    for weight in ((1, 2) if PRODUCTS[name] != torch.float32 and query == 64 else (2,))
                ]
                continue
            for width in WIDTHS if name != "float32" else WIDTHS[:1]:
                slow = PRODUCTS[name] == torch.float32 or width >= 256
                light = not slow and "affinity" not in kernel and KERNELS[kernel] != "pairs_kernel"
                weights = (2,) if not light else (1, 2) if kernel.startswith("mix") else (0, 1, 2)
                found += [Entry(kernel, name, width, weight) for weight in weights]
            if kernel == "relu2_attention" and PRODUCTS[name] != torch.float32:  # chains: narrow queries, wide values
                found += [Entry(kernel, name, 320, weight, 64) for weight in (1, 2)]
    return found


def place(table: dict, entry: Entry, tile: Configuration) -> None:
    """Puts the tile shape into the table, whose lists are read from the narrow and light to the wide and heavy."""
    rows = table.setdefault(entry.kernel, {}).setdefault(entry.products, [])
    key = lambda row: (row["width"], row.get("query", 0), row["weight"])
    query = {} if entry.query is None else {"query": entry.query}
    new = {**query, "width": entry.width, "weight": entry.weight, **tile._asdict()}
    rows[:] = sorted([new, *(row for row in rows if key(row) != key(new))], key=key)


def compile_alone(entry: Entry, tile: Configuration, arch: str) -> float:
    """predicted, where a compiler has killed the process that it and others ran in; infinite if it does so again."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(predicted, entry, tile, arch).result()
        except BrokenProcessPool:
            return math.inf


def tune(
    wanted: Iterable[Entry], arch: str, offline: bool, folder: Path, record: Path, jobs: int | None, deadline: float
) -> bool:
    """Finds every entry that the record does not have; whether there was time for all."""
    file = folder / f"{table_name(arch)}.json"
    done = {tuple(row["entry"]) for row in read(record)}
    tiles = {e: list(dict.fromkeys([current(e, arch), *candidates(e)])) for e in wanted if e not in done}
    print(f"{len(tiles)} entries to find; {len(done)} are in {record.name} (delete it to find them anew)", flush=True)
    where = circumstances("cpu" if offline else "cuda")
    # a fresh process each: what compiles must not inherit a GPU driver that is in use
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {e: [pool.submit(predicted, e, tile, arch) for tile in some] for e, some in tiles.items()}
        for number, (entry, some) in enumerate(tiles.items(), 1):
            costs = []
            for tile, future in zip(some, futures[entry], strict=True):
                if time.monotonic() >= deadline:
                    raise FutureTimeout
                try:
                    cost = future.result(timeout=deadline - time.monotonic())
                except BrokenProcessPool:
                    cost = compile_alone(entry, tile, arch)
                costs.append(cost if offline or math.isinf(cost) else measured(entry, tile, arch))
            cost, best = min(zip(costs, some, strict=True))
            title = f"{number}/{len(tiles)} {entry.kernel} {entry.products} width {entry.width} weight {entry.weight}"
            print(f"{title}: {best if math.isfinite(cost) else 'nothing compiles cleanly, left as it was'}", flush=True)
            if math.isfinite(cost):
                table = json.loads((file if file.exists() else folder / "default.json").read_text())
                place(table, entry, best)
                file.with_suffix(".new").write_text(dump(table))
                file.with_suffix(".new").replace(file)
            tried = [[*tile, cost if math.isfinite(cost) else None] for tile, cost in zip(some, costs, strict=True)]
            append(record, [{"entry": entry, "offline": offline, "tiles": tried, **where}])
    except FutureTimeout:
        print(f"Stopped for the time limit; {record.name} says what is done. Run the same command to go on.")
        return False
    finally:
        pool.shutdown(cancel_futures=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--offline", metavar="ARCH", help="choose for this architecture, such as 90, by prediction")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS), help="only these")
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=list(PRODUCTS), help="only these")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long (run again to go on)")
    parser.add_argument("--jobs", type=int, help="processes that compile (default: one a core)")
    arguments = parser.parse_args()
    if not arguments.offline and not torch.cuda.is_available():
        print("There is no GPU here: choose by prediction with --offline ARCH.")
        return 1
    arch = arguments.offline or configurations.architecture(torch.device("cuda")).removeprefix("sm_")
    device = "offline" if arguments.offline else slug(torch.cuda.get_device_name())
    record = ROOT / "bench" / "results" / f"tiles-{table_name(arch)}-{device}.jsonl"
    deadline = time.monotonic() + 60 * min(arguments.minutes, 10**6)
    wanted = entries(arguments.kernel, arguments.products)
    done = tune(wanted, arch, bool(arguments.offline), TUNED, record, arguments.jobs, deadline)
    return 0 if done else 2


def dump(table: dict) -> str:
    """JSON with one entry a line."""
    kernels = []
    for kernel, dtypes in table.items():
        lists = [
            f'  "{name}": [\n' + ",\n".join(f"   {json.dumps(e)}" for e in entries) + "\n  ]"
            for name, entries in dtypes.items()
        ]
        kernels.append(f' "{kernel}": {{\n' + ",\n".join(lists) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
