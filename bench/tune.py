"""Chooses the tile shapes of the Triton kernels and writes them to kernels/tuned: `python -m bench.tune [--offline
90]`.

On a GPU every candidate that compiles without spills is timed, on a long and a short case; `--offline ARCH` chooses by
what `bench.codegen` predicts from the machine code instead. An entry is the best candidate for a kernel, a dtype, a
width and the weight of a call (see glomo.kernels.configurations); it is kept only where every kind of call of that
weight compiles cleanly. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from bench.codegen import CALLS, Case, examine, launches, products, relate
from glomo.kernels import configurations
from glomo.kernels.configurations import Configuration, block
from glomo.kernels.launch import Launch

TUNED = Path(configurations.__file__).parent / "tuned"
KERNELS = {
    "relu2_attention": "forward_kernel",
    "targets": "targets_kernel",
    "sources": "sources_kernel",
    "pairs": "pairs_kernel",
    "affinity_targets": "targets_kernel",
    "affinity_sources": "sources_kernel",
    "relu2_affinity": "affinity_kernel",
}
PRODUCTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
WIDTHS = (64, 128, 256)

Run = Callable[[Case], None]

ATTENTION = [
    ["plain"],
    ["glomo: strictly causal, bias per target", "packed"],
    ["full bias", "bias per source, padding mask", "dropout", "skipping tiles"],
]
"""Calls of weight 0, 1 and 2 (names of bench.codegen.CALLS)."""


def calls(kernel: str, weight: int) -> list[Run]:
    """The kinds of call of a weight that launch the kernel."""
    graphs: list[Run] = [
        lambda c: relate(c, None, None),
        relate,
        lambda c: relate(c, "full", -1),
    ]
    if "affinity" in kernel:
        return [graphs[weight]]
    attention = [CALLS[name] for name in ATTENTION[weight]]
    if kernel == "pairs":
        return [attention[0], graphs[2]]
    return attention


def candidates(kernel: str, dtype: torch.dtype, width: int) -> list[Configuration]:
    """Tile shapes worth a try, from large to small."""
    features = [width]
    if width == 256:
        features = [128, 64] if kernel != "relu2_attention" else [256, 128]
    shapes: list[tuple[int, int, int]]
    if dtype == torch.float32:
        shapes = [(64, 64, 8), (64, 32, 4), (64, 32, 8), (64, 32, 16), (32, 64, 4), (32, 32, 8), (32, 32, 4)]
    elif kernel in ("sources", "affinity_sources", "pairs"):
        shapes = [(64, 128, 8), (64, 64, 4), (32, 128, 8), (32, 64, 4), (64, 64, 8), (32, 64, 8)]
    else:
        shapes = [(128, 128, 8), (128, 64, 4), (64, 64, 4), (128, 64, 8), (64, 32, 4), (64, 32, 8)]
    if width == 256:
        shapes = [shape for shape in shapes if shape[0] * shape[1] <= 64 * 64]
    stages = [2] if dtype != torch.float32 else [1]
    return [Configuration(m, n, f, w, s) for m, n, w in shapes for f in features for s in stages]


def with_configuration(kernel: str, tile: Configuration, case: Case, architecture: str) -> list[Launch]:
    """The kernel's launches in a case, with this tile shape."""
    original = configurations._entry

    def entry(name, arch, dtype, width, features, weight):
        if name == kernel:
            return tile._replace(features=min(block(features), tile.features))
        return original(name, arch, dtype, width, features, weight)

    with mock.patch.object(configurations, "_entry", entry):
        found = launches(case, architecture)
    return [launch for launch in found if launch.kernel.__name__ == KERNELS[kernel]]


def predicted(kernel: str, tile: Configuration, dtype: torch.dtype, width: int, weight: int, arch: str) -> float:
    """Clocks per pair and column of a product, by the machine code; infinite where a call does not compile cleanly."""
    cost = math.inf
    for run in calls(kernel, weight):
        case = Case("tuning", dtype, width, width, run)
        for launch in with_configuration(kernel, tile, case, f"sm_{arch}"):
            try:
                report = examine(launch, arch)
            except Exception:
                return math.inf
            if report.problems:
                return math.inf
            work = tile.M * tile.N * products(launch)
            t, c = report.tensor_clocks, report.issue_clocks
            if math.isinf(cost):  # the first kind of call decides, several blocks overlap each other's clocks
                cost = (max(t, c, (t + c) / report.blocks) + 0.1 * (t + c)) / work
            if not t:  # no tensor cores in sight: larger tiles, then more blocks
                cost = 10.0 / (tile.M * tile.N * min(report.blocks, 2))
    return cost


def measured(kernel: str, tile: Configuration, dtype: torch.dtype, width: int, weight: int, arch: str) -> float:
    """Time of the kernel's first kind of call on the GPU at hand: logarithms added up over a long and a short case."""
    from triton.testing import do_bench

    if math.isinf(predicted(kernel, tile, dtype, width, weight, arch)):
        return math.inf
    total = 0.0
    for heads, size in ((16, 4096), (512, 256)):
        case = Case("tuning", dtype, width, width, calls(kernel, weight)[0], "cuda", heads, size)
        timed = with_configuration(kernel, tile, case, f"sm_{arch}")
        total += math.log(do_bench(lambda timed=timed: [launch.run() for launch in timed]))  # type: ignore[misc]
    return total


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--offline", metavar="ARCH", help="choose for this architecture, such as 90, by prediction")
    parser.add_argument("--out", type=Path, default=TUNED, help="folder to write to (default: the package's own)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long (run again to go on)")
    arguments = parser.parse_args()
    if arguments.offline:
        arch, cost = arguments.offline, predicted
    elif torch.cuda.is_available():
        arch, cost = "{}{}".format(*torch.cuda.get_device_capability()), measured
    else:
        print("There is no GPU here: choose by prediction with --offline ARCH.")
        return 1
    deadline = time.monotonic() + 60 * arguments.minutes
    unfinished = arguments.out / f"sm_{arch}.json.unfinished"
    table = json.loads(unfinished.read_text()) if unfinished.exists() else {}
    for kernel in KERNELS:
        for name, dtype in PRODUCTS.items():
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            entries = table.setdefault(kernel, {}).setdefault(name, [])
            done = {(e["width"], e["weight"]) for e in entries}
            for width in WIDTHS if name != "float32" else WIDTHS[:1]:
                # what is heavy or slow anyway gets one entry for all weights
                light = dtype != torch.float32 and width < 256 and kernel in ("relu2_attention", "targets", "sources")
                for weight in (0, 1, 2) if light else (2,):
                    if (width, weight) in done:
                        continue
                    if time.monotonic() > deadline:
                        print(f"Stopped for the time limit; {unfinished} holds what is done.")
                        return 2
                    tiles = candidates(kernel, dtype, width)
                    costs = [cost(kernel, tile, dtype, width, weight, arch) for tile in tiles]
                    best = min(range(len(tiles)), key=costs.__getitem__)
                    verdict = "" if math.isfinite(costs[best]) else "  ** nothing compiles cleanly"
                    print(f"{kernel} {name} width {width} weight {weight}: {tiles[best]}{verdict}", flush=True)
                    entries.append({"width": width, "weight": weight, **tiles[best]._asdict()})
                    unfinished.write_text(dump(table))
    (arguments.out / f"sm_{arch}.json").write_text(dump(table))
    unfinished.unlink()
    return 0


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
