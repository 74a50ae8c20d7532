"""Tile shapes of the Triton kernels: data in `tuned/*.json`, one file for a GPU architecture.

A file is {kernel: {products: [entry, ...]}}, where products is a dtype or "tf32". An entry says how wide a query or a
value (a query alone, if it says "query") and how heavy a call it has the registers for, then the numbers of a
:class:`Configuration`; the first that fits is taken. `python -m bench.tune` writes such a file; nothing is tuned at a
user's call.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor


class Configuration(NamedTuple):
    M: int  # targets of a tile
    N: int  # sources of a tile
    features: int  # columns of the value at a time
    warps: int
    stages: int


@functools.cache
def _table(name: str) -> dict:
    file = resources.files(__package__) / "tuned" / f"{name}.json"
    if not file.is_file():
        return _table("default")
    return json.loads(file.read_text())


def architecture(device: torch.device) -> str:
    """The name of the device's file: sm_90 is H100 and H200, sm_80 A100, sm_89 L4 and RTX 4090."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@torch.compiler.assume_constant_result
def tf32_allowed() -> bool:
    """Whether fp32 products may be TF32: torch.set_float32_matmul_precision and PyTorch's newer settings of it. An
    exported program keeps the answer that it was traced with."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(dtype: torch.dtype) -> str:
    """fp32 products follow PyTorch's setting; the others have one way only."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def block(size: int) -> int:
    """The power of two that holds size, 16 at least."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def two_blocks(columns: int) -> dict[str, int]:
    """Two powers of two that hold so many columns together; the second is 0 where it would be as large as the first."""
    whole = block(columns)
    rest = block(columns - whole // 2)
    return dict(F=whole, G=0) if whole < 32 or rest == whole // 2 else dict(F=whole // 2, G=rest)


def weight(
    diagonal: int | None, packed: bool, bias_kind: str, masked: bool, dropout: bool, *rows: Tensor | None
) -> int:
    """How much a tile costs beyond its products: 0 nothing, 1 a diagonal or packed sequences, 2 a mask, dropout, a bias
    for every pair or several mixtures; 3 is a mixture's gradient in fp32. Rows (of query and value) of
    no multiple of 16 columns are loaded through registers: 2, or 3 where they are wide or the call is a 2 already."""
    columns = [t.size(-1) for t in rows if t is not None]
    heavy = 2 if masked or dropout or bias_kind == "full" else 1 if packed or diagonal is not None else 0
    if any(c % 16 for c in columns):
        return 3 if max(columns) > 64 or heavy == 2 else 2
    return heavy


def configuration(kernel: str, query: Tensor, features: int, weight: int) -> Configuration:
    """The tile shape of a kernel for this query, a value of so many columns (a block, where they are one power of two)
    and a call of this weight."""
    widths = block(query.size(-1)), features
    products = "tf32" if precision(query.dtype) == "tf32" else str(query.dtype)[6:]
    return _entry(kernel, architecture(query.device), products, *widths, weight)


@functools.lru_cache(maxsize=4096)
def _entry(kernel: str, architecture: str, products: str, width: int, features: int, weight: int) -> Configuration:
    entries = _table(architecture)[kernel][products]
    widest = max(width, min(features, entries[-1]["width"]))
    fitting = (e for e in entries if widest <= e["width"] and width <= e.get("query", width) and weight <= e["weight"])
    e = next(fitting, next((e for e in reversed(entries) if "query" not in e), entries[-1]))
    return Configuration(e["M"], e["N"], min(features, e["features"]), e["warps"], e["stages"])
