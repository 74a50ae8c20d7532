"""`python -m bench.domains [--source mnist] [--target digits] [--seeds 5] [--steps 1500] [--skada] [--out PNG]`:
handwritten digits of one collection read by a network that saw labels of the other: MNIST (28 x 28, without its margin
of 4) and UCI digits (8 x 8), both at 16 x 16.

source alone    labels of the source only
CORAL           and features of the target with the source's covariance
DANN            and features that do not tell source from target
skada's DANN    with --skada, which `make setup` does not install (`pip install skada skorch` in an environment of its
                own): the same network, optimizer and passes over the source, once as it comes and once with a
                classifier of domains that ends in a sigmoid (its own ends in a softmax of one number, which is 1)
target-trained  labels of the target: how far there is to go

Test error on the target's test split, mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo import plots
from glomo.data.catalogue import load_images
from glomo.transfer.domains import DomainAdversary, coral, gradient_reversal, joint_features, project

SIDE, BATCH, FEATURES = 16, 64, 64
SKADA = ("skada's DANN", "skada's DANN with a sigmoid")
Examples = tuple[Tensor, Tensor]


class Network(nn.Module):
    """Two convolutions and a layer of features, and a layer of classes on it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(2 * SIDE * SIDE, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def images(name: str, split: str) -> Examples:
    """(N, 1, 16, 16) from 0 to 1, and classes (N,)."""
    pixels, labels = load_images(name, split)
    found = torch.from_numpy(pixels).float()[:, None] / float(pixels.max())
    found = found[..., 4:-4, 4:-4] if name == "mnist" else found
    found = F.interpolate(found, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return found, torch.from_numpy(labels)


def batch(seed: int, step: int, examples: Examples) -> Examples:
    """The step's examples: every one of them once an epoch."""
    a_pass = len(examples[1]) // BATCH
    generator = torch.Generator().manual_seed(1000 * seed + step // a_pass)
    order = torch.randperm(len(examples[1]), generator=generator)
    chosen = order[step % a_pass * BATCH :][:BATCH]
    return examples[0][chosen], examples[1][chosen]


Extra = Callable[[Tensor, Tensor], Tensor]


def trained(network: Network, labelled: Examples, steps: int, seed: int, other: Tensor | None = None,
            extra: Extra = coral, added: nn.Module | None = None) -> Network:  # fmt: skip
    """The network after so many steps on labelled images, with extra(features, features of the others)."""
    parameters = [*network.parameters(), *(added.parameters() if added is not None else ())]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for step in range(steps):
        x, y = batch(seed, step, labelled)
        if other is None:
            loss = F.cross_entropy(network(x), y)
        else:
            ours, others = joint_features(network.features, x, batch(seed + 500, step, (other, other))[0])
            loss = F.cross_entropy(network.head(ours), y) + extra(ours, others)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def by_way(way: str, source: Examples, target: Examples, steps: int, seed: int) -> tuple[Network, str]:
    """A network trained in this way, and what there is to say of it."""
    torch.manual_seed(seed)
    network, note = Network(), ""
    if way in ("source alone", "target-trained"):
        return trained(network, source if way == "source alone" else target, steps, seed), note
    if way == "CORAL":
        return trained(network, source, steps, seed, target[0]), note
    adversary = DomainAdversary(FEATURES, (100,), 2, steps)
    last: list[float] = []

    def adversarial(ours: Tensor, others: Tensor) -> Tensor:
        found = adversary(ours, others)
        adversary.advance()
        last.append(float(found.loss.detach()))
        return found.loss

    network = trained(network, source, steps, seed, target[0], adversarial, adversary)
    return network, f"loss of domains at the end {statistics.fmean(last[-100:]):.3f} (ln 2 = {math.log(2):.3f})"


class Domains(nn.Module):
    """What skada's classifier of domains is meant to be: behind a reversal, with a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())

    def forward(self, x: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return self.layers(gradient_reversal(x, 1.0))[..., 0]


def skada_dann(default: bool, source: Examples, target: Examples, steps: int, seed: int) -> nn.Module:
    """skada's, with our network, optimizer and as many passes over the source; its constant weight is 1."""
    import numpy as np
    from skada.deep import DANN

    torch.manual_seed(seed)
    network = Network()
    model = DANN(network, layer_name="features", num_features=FEATURES, batch_size=2 * BATCH,
                 domain_classifier=None if default else Domains(),
                 max_epochs=max(1, steps * BATCH // len(source[1])), optimizer=torch.optim.Adam, lr=1e-3,
                 train_split=None, verbose=0)  # fmt: skip
    x = np.concatenate([source[0].numpy(), target[0].numpy()])
    y = np.concatenate([source[1].numpy(), np.full(len(target[1]), -1)])
    model.fit(x, y, sample_domain=np.concatenate([np.ones(len(source[1])), np.full(len(target[1]), -2)]).astype(int))
    return model.module_.base_module_


@torch.no_grad()
def error(network: nn.Module, examples: Examples) -> float:
    """Per cent."""
    network.eval()
    return 100 * float((network(examples[0]).argmax(-1) != examples[1]).float().mean())


@torch.no_grad()
def draw(before: nn.Module, after: nn.Module, domains: Mapping[str, Examples], path: Path) -> None:
    """The features of about 350 images of each domain, without and with an adversary."""
    some = {name: (x[:: len(x) // 350], y[:: len(y) // 350]) for name, (x, y) in domains.items()}
    both = torch.cat([x for x, _ in some.values()])
    points = [project(network.features(both), "tsne") for network in (before, after)]  # type: ignore[operator]
    names = [name for name, (_, y) in some.items() for _ in y]
    plots.domain_map(*points, names, [str(int(k)) for _, y in some.values() for k in y], path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("mnist", "digits"), default="mnist")
    parser.add_argument("--target", choices=("mnist", "digits"), default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skada", action="store_true")
    parser.add_argument("--out", type=Path, help="picture of the features (t-SNE, which needs scikit-learn)")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    source, target, test = images(given.source, "train"), images(given.target, "train"), images(given.target, "test")
    print(f"torch {torch.__version__}, {given.threads} threads; {given.source} ({len(source[1])} labelled) -> "
          f"{given.target} ({len(target[1])} without, {len(test[1])} in the test), {given.steps} steps")  # fmt: skip
    errors, kept = dict[str, list[float]](), dict[str, nn.Module]()
    for way in ("source alone", "CORAL", "DANN", "target-trained", *(SKADA if given.skada else ())):
        notes, seconds = "", 0.0
        for seed in range(given.seeds):
            begun = time.monotonic()
            if way.startswith("skada"):
                network: nn.Module = skada_dann(way == SKADA[0], source, target, given.steps, seed)
            else:
                network, notes = by_way(way, source, target, given.steps, seed)
            seconds += time.monotonic() - begun
            errors.setdefault(way, []).append(error(network, test))
            if not seed and way in ("source alone", "DANN"):
                kept[way] = network
        found = errors[way]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        print(f"{way}: {statistics.fmean(found):.1f}{spread} %, {seconds / given.seeds:.0f} s; {notes}", flush=True)
    gains = [a - b for a, b in zip(errors["source alone"], errors["DANN"], strict=True)]
    if given.out:
        draw(kept["source alone"], kept["DANN"], {given.source: source, given.target: test}, given.out)
    if len(gains) > 1:
        print(f"source alone - DANN: {statistics.fmean(gains):.1f} points, standard error "
              f"{statistics.stdev(gains) / len(gains) ** 0.5:.1f}")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
