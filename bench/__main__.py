"""`python -m bench [--rounds N] [--threads N]`: the ops against the authors' formulation, in one run on this machine.

Prints ratios of medians, times with their 20th and 80th percentile, and peak extra memory.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import glomo
from bench import peers
from bench.measure import Timing, extra_memory, timings
from glomo.nn import GLoMo, GLoMoConfig

Work = Callable[[], object]


def both_ways(call: Callable[..., Tensor], tensors: list[Tensor]) -> Work:
    """Forward and backward, the gradients dropped."""

    def work() -> None:
        out = call(*tensors)
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    return work


def graph_part() -> tuple[str, dict[str, Work]]:
    """The affinity and aggregation of one pre-training step: 3 layers x 8 heads of 64, batch 32, length 200."""
    layers, batch, heads, size, dim = 3, 32, 8, 200, 64

    def tensors() -> list[Tensor]:
        shapes = [(batch, size, heads, dim)] * 3 + [(batch, size, heads, 1)]
        return [torch.randn(s).transpose(1, 2).requires_grad_() for s in shapes]

    inputs = [tensors() for _ in range(layers)]

    def run(call: Callable[..., Tensor]) -> Work:
        works = [both_ways(call, part) for part in inputs]
        return lambda: [work() for work in works]

    def ours(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return glomo.relu2_attention(query, key, value, bias, is_causal=True, diagonal=-1)  # type: ignore[return-value]

    name = "pre-training, graph part (B 32, T 200, 3 x 8 heads of 64), forward + backward"
    return name, {"ours": run(ours), "authors": run(peers.authors_attention)}


@contextmanager
def authors_graphs() -> Iterator[None]:
    """GLoMo's modules on the authors' formulation."""

    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Any, attn_mask: Any, **_: Any) -> Tensor:
        return peers.authors_attention(query, key, value, bias)

    with mock.patch("glomo.nn.graphs.relu2_attention", attention):
        yield


def whole_step() -> tuple[str, dict[str, Work]]:
    """One step of the released model, the embedding smaller so that the vocabulary does not drown the rest."""
    config = GLoMoConfig.preset("released", vocab_size=2000, head_dim=64, positions=20)
    torch.manual_seed(0)
    model = GLoMo(config)
    tokens, lengths = torch.randint(2, 2000, (32, 200)), torch.full((32,), 200)

    def step() -> None:
        model.zero_grad()
        model(tokens, lengths).backward()

    def authors() -> None:
        with authors_graphs():
            step()

    return "pre-training, whole step (d 512, vocabulary 2000)", {"ours": step, "authors": authors}


def chained_mix() -> tuple[str, dict[str, Work]]:
    """A mixture of 6 layers x 8 heads with chains: T 400, 300 features, batch 4, strictly causal, forward."""
    heads, n, size = 8, 48, 400
    query, key = torch.randn(4, n, size, 64), torch.randn(4, n, size, 64)
    features, bias = torch.randn(4, size, 300), torch.randn(4, n, size, 1)
    weights, chains = torch.rand(n), torch.rand(n)

    def ours() -> object:
        return glomo.relu2_graph_mix(
            *(query, key, features, weights, chains, bias), num_heads=heads, is_causal=True, diagonal=-1
        )

    def authors() -> object:
        return peers.authors_graph_mix(query, key, features, weights, chains, bias, heads)

    name = "relu2_graph_mix with chains (6 x 8 heads of 64, T 400, 300 features, B 4), forward"
    return name, {"ours": ours, "authors": authors}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    print(f"{versions}, {options.threads} threads")
    print("| what | authors / ours | ours, ms (p20-p80) | authors, ms (p20-p80) | extra memory ours / authors, MB |")
    print("|---|---|---|---|---|")
    for case in (graph_part, whole_step, chained_mix):
        name, works = case()
        rounds = max(3, options.rounds // 3) if case is whole_step else options.rounds  # a step takes seconds
        found = timings(works, rounds, warmup=1)
        memory = {key: extra_memory(work) / 1e6 for key, work in works.items()}
        ratio = found["authors"].median / found["ours"].median
        cells = [name, f"{ratio:.2f}x", _cell(found["ours"]), _cell(found["authors"])]
        print(f"| {' | '.join(cells)} | {memory['ours']:.0f} / {memory['authors']:.0f} |", flush=True)


def _cell(timing: Timing) -> str:
    return f"{1e3 * timing.median:.0f} ({1e3 * timing.p20:.0f}-{1e3 * timing.p80:.0f})"


if __name__ == "__main__":
    main()
