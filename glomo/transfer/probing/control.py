"""What a probe's accuracy is to be compared with: control tasks, and the most frequent label of each word."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glomo.transfer.probing.probe_model import LINEAR, Features, ProbeSettings
from glomo.transfer.probing.probes import Documents, ProbeResult, RegressionResult, checked_labels, probe
from glomo.transfer.probing.splits import Split, check_split, split_documents


def control_labels(words: Sequence[Hashable], labels: Tensor | Sequence[int], seed: int = 0) -> Tensor:
    """The labels (N,) of a control task: random, but all rows of one word have the same,

    .. code-block:: text

        C(v) = the smallest c with  share of labels <= c  above  u(v),    u(v) = sha256(seed, v) in [0, 1)

    so that labels are as frequent as in the task, over the types of words. A word's label depends on the word and on
    the shares of the labels, not on the order of the words or on what else is there.

    Args:
        words: the word of each row (its type: a text, or an id).
        labels: (N,) of the task, whose shares are taken.
        seed: makes another control task.

    Raises:
        ValueError: there is not one word for each label.

    Source: Hewitt & Liang, EMNLP 2019, section 2.
    """
    y = checked_labels(labels, len(words))
    shares = (y.bincount().double() / len(y)).cumsum(0)
    draws = {word: _uniform(word, seed) for word in set(words)}
    last = int(y.max())
    found = torch.searchsorted(shares.cpu(), torch.tensor([draws[word] for word in words]).double(), right=True)
    return found.clamp(max=last)


@dataclass(frozen=True)
class Selectivity:
    """A task and its control task, probed alike."""

    task: ProbeResult
    control: ProbeResult

    @property
    def selectivity(self) -> float:
        """accuracy(task) - accuracy(control)"""
        return self.task.accuracy - self.control.accuracy

    def row(self) -> dict[str, str]:
        """For `probe_table`."""
        figures = {"control": f"{100 * self.control.accuracy:.2f}", "selectivity": f"{100 * self.selectivity:.2f}"}
        return {**self.task.row(), **figures}


def selectivity(
    features: Features,
    labels: Tensor | Sequence[int],
    words: Sequence[Hashable],
    documents: Documents | None = None,
    split: Split | None = None,
    settings: ProbeSettings = LINEAR,
) -> Selectivity:
    """Probe a task and its control task, on the same rows: a probe that learns the random labels of words as well has
    learned its answers itself, and its accuracy says little of the features.

    Args:
        words: the word of each row; the others as `glomo.transfer.probing.probe`.

    Raises:
        ValueError, TypeError: as `probe` and `control_labels`.

    Source: Hewitt & Liang, EMNLP 2019.
    """
    control = control_labels(words, labels, settings.seed)
    return Selectivity(*(probe(features, y, documents, split, settings) for y in (labels, control)))


def word_majority(
    words: Sequence[Hashable],
    labels: Tensor | Sequence[int],
    documents: Documents | None = None,
    split: Split | None = None,
    seed: int = 0,
) -> float:
    """Accuracy on the test rows of each word's most frequent label among the training rows (of equally frequent ones
    the smallest); a word that is not there has the most frequent label of all.

    Raises:
        ValueError: there is not one word for each label; the split does not fit.

    Source: Liu et al., NAACL 2019 (word-conditional majority baseline).
    """
    y = checked_labels(labels, len(words)).tolist()
    if split is None:
        split = split_documents(len(y) if documents is None else documents, seed=seed)
    check_split(split, len(y), documents)
    counts: dict[Hashable, Counter[int]] = defaultdict(Counter)
    total: Counter[int] = Counter()
    for row in split.train.tolist():
        counts[words[row]][y[row]] += 1
        total[y[row]] += 1
    right = sum(_most(counts.get(words[row], total)) == y[row] for row in split.test.tolist())
    return right / len(split.test)


def probe_layers(
    features: Mapping[str, Tensor],
    labels: Tensor | Sequence[int],
    documents: Documents | None = None,
    split: Split | None = None,
    settings: ProbeSettings = LINEAR,
    words: Sequence[Hashable] | None = None,
    mix: bool | None = None,
) -> dict[str, ProbeResult | Selectivity]:
    """The same probe on each layer, and, as "mix", on a learned `ScalarMix` of all.

    Args:
        features: {layer: (N, dim)}.
        words: also the control task, with the word of each row.
        mix: none: where there are several layers, of one width.

    Raises:
        ValueError, TypeError: as `probe`; a layer is called "mix".
    """
    if "mix" in features:
        raise ValueError("a layer is called 'mix', which is the name of the mixture; another one is needed")
    if not features:
        raise ValueError("there is no layer; at least one is needed")
    every: dict[str, Features] = dict(features)
    one_width = len(features) > 1 and len({layer.shape[1:] for layer in features.values()}) == 1
    if one_width if mix is None else mix:
        every["mix"] = list(features.values())
    if words is None:
        return {name: probe(x, labels, documents, split, settings) for name, x in every.items()}
    return {name: selectivity(x, labels, words, documents, split, settings) for name, x in every.items()}


def probe_table(results: Mapping[str, ProbeResult | RegressionResult | Selectivity]) -> str:
    """Lines to read: one a layer. Accuracies in percent."""
    rows = {name: result.row() for name, result in results.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max([len("layer"), *map(len, rows)])
    widths = [max(len(column), *(len(row.get(column, "")) for row in rows.values())) for column in columns]
    lines = ["  ".join([f"{'layer':<{width}}", *(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))])]
    for name, row in rows.items():
        cells = (f"{row.get(c, ''):>{w}}" for c, w in zip(columns, widths, strict=True))
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def _uniform(word: Hashable, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\0{type(word).__name__}\0{word}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _most(counts: Counter[int]) -> int:
    return min(counts, key=lambda label: (-counts[label], label))
