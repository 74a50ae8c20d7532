"""Probes: what a simple classifier, or a regression, can read out of frozen features."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.nn.precision import at_least_fp32
from glomo.transfer.probing.correlation import spearman
from glomo.transfer.probing.probe_model import LINEAR, Features, Probe, ProbeSettings, layers_of
from glomo.transfer.probing.splits import Split, check_split, seeded, split_documents

Documents = Sequence[Hashable] | Tensor
_ROWS = 8192
"""judged at a time"""


@dataclass(frozen=True)
class ProbeResult:
    """What a probe has come to. Accuracies are shares of the rows."""

    accuracy: float
    """on the test rows"""
    majority: float
    """accuracy there of the most frequent label of the training rows"""
    classes: int
    """labels that occur"""
    examples: tuple[int, int, int]
    """rows to train on, held out, and to test on"""
    valid_accuracy: float
    epochs: int
    """trained; the weights are the best epoch's"""
    probe: Probe = field(repr=False, compare=False)

    def row(self) -> dict[str, str]:
        """For `probe_table`."""
        return {
            "accuracy": f"{100 * self.accuracy:.2f}",
            "majority": f"{100 * self.majority:.2f}",
            "classes": f"{self.classes}",
            "tested": f"{self.examples[2]:,}",
        }


@dataclass(frozen=True)
class RegressionResult:
    """What a regression probe has come to, on the test rows."""

    r2: float
    """1 - sum (y - prediction)^2 / sum (y - mean y)^2: 0 is what the mean is worth; nan where y does not vary"""
    spearman: float
    examples: tuple[int, int, int]
    epochs: int
    probe: Probe = field(repr=False, compare=False)

    def row(self) -> dict[str, str]:
        """For `probe_table`."""
        return {"R2": f"{self.r2:.4f}", "Spearman": f"{self.spearman:.4f}", "tested": f"{self.examples[2]:,}"}


def probe(
    features: Features,
    labels: Tensor | Sequence[int],
    documents: Documents | None = None,
    split: Split | None = None,
    settings: ProbeSettings = LINEAR,
) -> ProbeResult:
    """Train a classifier of frozen features on some documents and judge it on others, with cross-entropy, Adam, and the
    accuracy on held-out documents as what ends training. The result is a function of the arguments alone.

    Args:
        features: (N, dim), of any floating type; or several layers of one width, of which a `ScalarMix` is learned.
        labels: (N,) whole numbers from 0 on.
        documents: the document of each row; none: each row is one.
        split: rows to train on, held out, and to test on; none: `split_documents(documents, seed=settings.seed)`.
        settings: `LINEAR`, `MLP`, or others.

    Raises:
        ValueError: shapes do not fit, features are not finite, a label is negative, the split does not fit.
        TypeError: the labels are no whole numbers.

    Source: Liu et al., NAACL 2019, section 3.
    """
    layers = checked_layers(features)
    y = checked_labels(labels, len(layers[0])).to(layers[0].device)
    split = _split(split, documents, len(y), settings.seed)
    model = Probe(layers[0].size(1), int(y.max()) + 1, len(layers), settings, *_kind(layers))

    def accuracy(rows: Tensor) -> float:
        return float((_outputs(model, layers, rows).argmax(-1) == y[rows]).double().mean())

    epochs, valid_accuracy = _fit(model, layers, y, split, settings, F.cross_entropy, accuracy)
    most = y[split.train].bincount().argmax()
    return ProbeResult(
        accuracy(split.test),
        float((y[split.test] == most).double().mean()),
        len(y.unique()),
        _sizes(split),
        valid_accuracy,
        epochs,
        model,
    )


def regression_probe(
    features: Features,
    targets: Tensor | Sequence[float],
    documents: Documents | None = None,
    split: Split | None = None,
    settings: ProbeSettings = LINEAR,
) -> RegressionResult:
    """`probe` of a number: mean squared error of the targets, standardised by the training rows as the features are.

    Args:
        targets: (N,) finite numbers.

    Raises:
        ValueError: as `probe`; a target is not finite.
    """
    layers = checked_layers(features)
    y = torch.as_tensor(targets).detach().to(layers[0].device).double()
    if y.shape != layers[0].shape[:1] or not bool(y.isfinite().all()):
        raise ValueError(f"the targets are {tuple(y.shape)}; {len(layers[0])} finite numbers, one a row, are needed")
    split = _split(split, documents, len(y), settings.seed)
    model = Probe(layers[0].size(1), 1, len(layers), settings, *_kind(layers))
    known = y[split.train]
    std = known.std(correction=0) if bool(known.amax() > known.amin()) else known.new_ones(())
    standard = ((y - known.mean()) / std).to(model.mean)

    def found(rows: Tensor) -> Tensor:
        return _outputs(model, layers, rows)[:, 0].double()

    def score(rows: Tensor) -> float:
        return -float((found(rows) - standard[rows]).square().mean())

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        return F.mse_loss(outputs[:, 0], wanted)

    epochs, _ = _fit(model, layers, standard, split, settings, loss, score)
    wanted, predicted = y[split.test], found(split.test) * std + known.mean()
    spread = (wanted - wanted.mean()).square().sum()
    r2 = 1 - float((wanted - predicted).square().sum() / spread) if bool(spread > 0) else float("nan")
    rho = float(spearman(predicted, wanted)) if len(wanted) > 1 else float("nan")
    return RegressionResult(r2, rho, _sizes(split), epochs, model)


def checked_layers(features: Features) -> list[Tensor]:
    """Layers of one shape (N, dim) and finite. Raises ValueError."""
    layers = layers_of(features)
    shapes = [tuple(layer.shape) for layer in layers]
    if not layers or len(set(shapes)) > 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        given = ", ".join(map(str, shapes)) or "none"
        raise ValueError(f"the features are {given}; (N, dim), or several layers of one such shape, are needed")
    for number, layer in enumerate(layers):
        if not layer.is_floating_point() or not bool(layer.isfinite().all()):
            raise ValueError(
                f"the features of layer {number} are {layer.dtype} or not finite; finite floats are needed"
            )
    return [layer.detach() for layer in layers]


def checked_labels(labels: Tensor | Sequence[int], rows: int) -> Tensor:
    """(N,) int64. Raises ValueError for a wrong number of them or a negative one, TypeError for no whole numbers."""
    found = torch.as_tensor(labels)
    if not rows or found.shape != (rows,):
        raise ValueError(
            f"the labels are {tuple(found.shape)} for {rows} rows; one each is needed, and at least one row"
        )
    if found.is_floating_point() or found.is_complex():
        raise TypeError(f"the labels are {found.dtype}; whole numbers are needed (regression_probe takes others)")
    if int(found.min()) < 0:
        raise ValueError(f"a label is {int(found.min())}; numbers from 0 on are needed")
    return found.long()


def _fit(
    model: Probe,
    layers: list[Tensor],
    targets: Tensor,
    split: Split,
    settings: ProbeSettings,
    loss: Callable[[Tensor, Tensor], Tensor],
    score: Callable[[Tensor], float],
) -> tuple[int, float]:
    """Train until the score on the held-out rows has not risen for some epochs; (epochs, best score)."""
    model.standardise_by([layer[split.train] for layer in layers])
    generator = seeded(settings.seed, "order")
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    best, kept, waited, epoch = -float("inf"), {}, 0, 0
    while epoch < settings.epochs and waited < settings.patience:
        epoch += 1
        order = split.train[torch.randperm(len(split.train), generator=generator).to(split.train.device)]
        with torch.enable_grad():
            for rows in order.split(settings.batch_size):
                optimizer.zero_grad()
                loss(model([layer[rows] for layer in layers]), targets[rows]).backward()
                optimizer.step()
        found = score(split.valid)
        waited += 1
        if found > best:
            best, waited = found, 0
            kept = {name: value.clone() for name, value in model.state_dict().items()}
    if not kept:
        raise ValueError(
            f"the probe's score is {found} from the first epoch on; a smaller lr than {settings.lr} is needed"
        )
    model.load_state_dict(kept)
    return epoch, best


@torch.no_grad()
def _outputs(model: Probe, layers: list[Tensor], rows: Tensor) -> Tensor:
    return torch.cat([model([layer[part] for layer in layers]) for part in rows.split(_ROWS)])


def _kind(layers: list[Tensor]) -> tuple[torch.dtype, torch.device]:
    """At least fp32, where the features are."""
    return at_least_fp32(layers[0].dtype), layers[0].device


def _split(split: Split | None, documents: Documents | None, rows: int, seed: int) -> Split:
    if documents is not None and len(documents) != rows:
        raise ValueError(f"there are {len(documents)} documents for {rows} rows; one each is needed")
    if split is None:
        return split_documents(rows if documents is None else documents, seed=seed)
    split = Split(*(torch.as_tensor(part) for part in split))
    check_split(split, rows, documents)
    return split


def _sizes(split: Split) -> tuple[int, int, int]:
    return len(split.train), len(split.valid), len(split.test)
