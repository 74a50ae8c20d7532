"""What is measured: one `Case` is an op on one shape, dtype and pass; a grid is a list of them.

`quick` says on two CPU cores in minutes how every op stands; `gpu` varies one thing at a time around a base shape;
`pretraining` is GLoMo's own use of the ops at its full size; `full` is the whole product of the shapes (hours; a run
that was killed goes on where it stood).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION = ("relu2_attention", "attention")
VARLEN = ("relu2_attention_varlen", "attention_varlen")
MIXES = ("graph_mix", "relu2_graph_mix")


@dataclass(frozen=True)
class Case:
    """An op on one shape.

    The graphs are `batch x layers x heads` of `length x length` (layers is 1 but for the mixes); in varlen `length` is
    the longest sequence. `causal` means strictly earlier sources for the ReLU² ops, and j <= t for `attention`.
    `padded` gives `attention` a mask (B, 1, 1, T) of sequences of a quarter of the length to all of it.
    `clusters` > 0 puts targets and sources into that many groups that do not read each other, so that a share
    1 - 1 / clusters of the score matrix is whole tiles without a positive score.
    """

    op: str
    batch: int
    heads: int
    length: int
    dim: int = 64
    value_dim: int = 64
    causal: bool = True
    dtype: str = "fp32"
    backward: bool = False
    layers: int = 1
    chains: bool = False
    clusters: int = 0
    padded: bool = False

    @property
    def shape(self) -> str:
        """The shape in words, without op, dtype and pass."""
        parts = [f"B{self.batch}", f"L{self.layers}" * (self.layers > 1), f"H{self.heads}", f"T{self.length}"]
        parts += [f"E{self.dim}" * (self.op != "graph_mix"), f"Ev{self.value_dim}" * (self.value_dim != self.dim)]
        parts += ["chains" * self.chains, f"clusters{self.clusters}" * (self.clusters > 0)]
        parts += ["causal" * (self.causal and self.op != "graph_mix"), "padded" * self.padded]
        return " ".join(filter(None, parts))

    @property
    def direction(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def id(self) -> str:
        return "-".join((self.op, self.shape.replace(" ", "_"), self.dtype, self.direction))

    @property
    def graphs(self) -> int:
        return self.batch * self.layers * self.heads


def both_passes(*cases: Case) -> Iterator[Case]:
    for case in cases:
        yield case
        yield replace(case, backward=True)


def quick() -> list[Case]:
    """Every op with the shapes of a GLoMo pre-training step, and one long sequence."""
    step = Case("relu2_attention", batch=32, heads=8, length=200)
    lengths = [replace(step, batch=2048 // t, heads=4, length=t) for t in (128, 512, 2048)]
    short, long = lengths[0], lengths[-1]
    mix = Case("graph_mix", batch=4, layers=3, heads=8, length=200, value_dim=300)
    return [
        *both_passes(step, *lengths),
        *both_passes(*(replace(c, dtype="bf16") for c in lengths)),
        *(replace(long, causal=False, clusters=c) for c in (1, 4, 16)),
        *both_passes(*(replace(c, op="attention") for c in lengths)),
        *both_passes(*(replace(c, op="attention", dtype="bf16") for c in lengths)),
        *both_passes(*(replace(long, op=op, causal=False, dtype="bf16") for op in ATTENTION)),
        *both_passes(replace(long, op="attention", causal=False)),
        *both_passes(replace(lengths[1], op="attention", causal=False, padded=True)),
        *both_passes(replace(short, op="relu2_affinity")),
        *(c for op in VARLEN for c in both_passes(replace(short, op=op, length=256))),
        *both_passes(replace(mix, chains=True)),
        *both_passes(replace(mix, op="relu2_graph_mix")),
        *both_passes(replace(mix, op="relu2_graph_mix", layers=6, length=400, chains=True)),
        Case("pretrain_step", batch=8, heads=8, length=200, layers=3, backward=True),
    ]


def _many_short(op: str, batch_heads: int, length: int, dim: int, causal: bool, dtype: str) -> Case:
    """GLoMo-like: many short sequences."""
    return Case(op, batch_heads // 8, 8, length, dim, dim, causal, dtype)


def _long(op: str, length: int, dim: int, causal: bool, dtype: str) -> Case:
    """FlashAttention's benchmark: 16k positions and a hidden size of 2048, whatever the length."""
    return Case(op, 16384 // length, 2048 // dim, length, dim, dim, causal, dtype)


def _mix(op: str, batch: int, length: int, value_dim: int, chains: bool, dtype: str) -> Case:
    return Case(op, batch, 8, length, 64, value_dim, True, dtype, layers=3, chains=chains)


LONG = (512, 1024, 2048, 4096, 8192, 16384)
CLUSTERS = (1, 2, 4, 8, 16, 32)


def _padded(length: int, dim: int, dtype: str) -> Case:
    return Case("attention", 32768 // length, 8, length, dim, dim, False, dtype, padded=True)


def gpu() -> list[Case]:
    """A few cases of every op, then one thing at a time around (64 sequences of 8 heads, T 128, E 64, causal, bf16),
    and the long sequences."""
    clustered = [Case("relu2_attention", 1, 32, 8192, causal=False, dtype="bf16", clusters=c) for c in CLUSTERS]
    packed = {t: [_many_short(op, 8 * 32768 // t, t, 64, True, "bf16") for op in VARLEN] for t in (128, 512, 2048)}
    cases = [_many_short(op, 512, 128, 64, True, "bf16") for op in (*ATTENTION, "relu2_affinity")]
    cases += [_long(op, 4096, 64, True, "bf16") for op in ATTENTION]
    cases += [_padded(t, 64, "bf16") for t in (128, 256, 512)]
    transfer = Case("relu2_graph_mix", 32, 8, 400, 64, 300, True, "bf16", layers=6)
    cases += [transfer, replace(transfer, chains=True)]
    cases += [clustered[0], clustered[3], *packed[512], *(_mix(op, 32, 200, 300, True, "bf16") for op in MIXES)]
    for op in ATTENTION:
        near = [(512, t, 64, True, "bf16") for t in (32, 512)] + [(bh, 128, 64, True, "bf16") for bh in (64, 2048)]
        near += [(512, 128, e, True, "bf16") for e in (32, 128)] + [(512, 128, 64, False, "bf16")]
        near += [(512, 128, 64, True, dtype) for dtype in ("fp32", "fp16")]
        cases += [_many_short(op, *point) for point in near]
        cases += [_long(op, t, e, c, "bf16") for t in LONG for e, c in ((64, True), (64, False), (128, True))]
    cases += [_long("relu2_attention", 4096, 64, True, dtype) for dtype in ("fp32", "fp16")]
    cases += [*clustered, *packed[128], *packed[2048]]
    cases += [_many_short("relu2_affinity", 512, t, 64, True, "bf16") for t in (32, 512)]
    cases += [_mix(op, 32, 200, ev, c, "bf16") for op in MIXES for ev in (64, 300, 1024) for c in (False, True)]
    cases += [_mix("relu2_graph_mix", 32, 200, 300, c, "fp32") for c in (False, True)]
    return [*pretraining(), *both_passes(*cases)]


def full() -> list[Case]:
    """The whole product."""
    many, dims, dtypes = (64, 512, 2048), (32, 64, 128), tuple(DTYPES)
    cases: list[Case] = []
    for op in ATTENTION:
        short = itertools.product(many, (32, 128, 512), dims, (True, False), dtypes)
        cases += [_many_short(op, *point) for point in short]
        cases += [_long(op, *point) for point in itertools.product(LONG, dims, (True, False), dtypes)]
    cases += [Case("relu2_attention", 1, 32, 8192, causal=False, dtype=d, clusters=c) for d in dtypes for c in CLUSTERS]
    for bh, t, e, dtype in itertools.product(many, (32, 128, 512), dims, dtypes):
        cases += [_many_short(op, bh, t, e, True, dtype) for op in ("relu2_affinity", *VARLEN)]
    for op, t, ev, chains, dtype in itertools.product(MIXES, (128, 200, 512), (64, 300, 1024), (False, True), dtypes):
        cases.append(_mix(op, 8, t, ev, chains, dtype))
    return [*quick(), *both_passes(*cases), *pretraining()]


def pretraining() -> list[Case]:
    """A layer of a pre-training step of the released size, the whole step, and the mixture with chains that a transfer
    takes from it."""
    part = Case("relu2_attention", batch=32, heads=8, length=200)
    chained = Case("relu2_graph_mix", batch=4, layers=6, heads=8, length=400, value_dim=300, chains=True)
    return [*both_passes(part), chained, replace(part, op="pretrain_step", layers=3, backward=True)]


GRIDS: dict[str, Callable[[], list[Case]]] = {"quick": quick, "gpu": gpu, "full": full, "pretraining": pretraining}
