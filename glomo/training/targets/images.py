"""Labelled images as a target task: their pixels are the units."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glomo.data import AnyVocabulary, Pixels
from glomo.errors import UserError
from glomo.training.targets.classifier import TextClassifier
from glomo.training.targets.target import TEST_BATCH, LabelTrial, Setting, divided, mixing, sampled
from glomo.training.targets.texts import check_classes
from glomo.training.targets.words import WordTable
from glomo.training.transfer_config import TransferConfig


def holds_images(name: str) -> bool:
    """Whether a data set of the catalogue is one of images."""
    from glomo.data.catalogue import DATASETS

    return name in DATASETS and DATASETS[name].kind == "images"


def images_of(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split."""
    from glomo.data.catalogue import load_images

    return load_images(name, split)


def pixels_for(name: str, images: np.ndarray, levels: int, side: int) -> Pixels:
    """The units of a data set's images."""
    from glomo.data.catalogue import greatest_value

    return Pixels(levels, images.shape[3] if images.ndim == 4 else 1, greatest_value(name), side)


def check_values(name: str, pixels: Pixels) -> None:
    """Raise UserError for a data set whose pixels have other values than those that the units were made of."""
    from glomo.data.catalogue import greatest_value

    if greatest_value(name) != pixels.most:
        raise UserError(
            f"the pixels of {name} have values up to {greatest_value(name)}, and the graph is of pixels up to "
            f"{pixels.most}"
        )


class PixelRows:
    """Images as sequences of units `(n, pixels)`, in the place of `glomo.data.Windows`."""

    def __init__(self, units: np.ndarray | Tensor) -> None:
        self.units = torch.as_tensor(units)
        self.lengths = torch.full((len(units),), units.shape[1], dtype=torch.int64)

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        rows = self.units[list(indices)]
        return rows, torch.full((len(rows),), rows.shape[1], dtype=torch.int64)


class ImageTarget:
    """The `Target` of labelled images."""

    measures = ("accuracy",)

    def __init__(self, config: TransferConfig, vocabulary: AnyVocabulary) -> None:
        data = config.data
        if not isinstance(vocabulary, Pixels):
            raise UserError(f"{data.dataset} holds images, but the graph is of words; one of pixels is needed")
        for name in (data.dataset, data.test_dataset or data.dataset):
            check_values(name, vocabulary)
        (images, labels), held = images_of(data.dataset, "train"), images_of(data.test_dataset or data.dataset, "test")
        order = list(range(len(labels)))
        if data.judge == "valid":
            order, other = divided(order, [str(i) for i in order])
            held = images[other], labels[other]
        judged = sampled(range(len(held[1])), data.judged)
        self.units = PixelRows(vocabulary.sequences(images[order]))
        self.held = PixelRows(vocabulary.sequences(held[0][judged]))
        if self.units.units.shape[1] != self.held.units.shape[1]:
            raise UserError(f"the images of {data.test_dataset} are larger or smaller than those of {data.dataset}")
        self.labels, self.held_labels = labels[order].tolist(), held[1][judged].tolist()
        self.classes = [str(label) for label in range(1 + max(self.labels + self.held_labels))]
        self.vocab_size, self.side = len(vocabulary), math.isqrt(self.units.units.shape[1])
        if config.head.kind == "conv" and self.side**2 != self.units.units.shape[1]:
            raise UserError("head.kind conv needs square images")
        self.test_ids = self.held.units.tolist()
        self.counts = {"training": len(self.labels), "test": len(self.held_labels)}
        self.meta: dict[str, Any] = {"kind": "image-classifier", "classes": self.classes}
        digest = hashlib.sha256(repr((self.labels, self.held_labels)).encode())
        for part in (self.units, self.held):
            digest.update(part.units.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def check(self, chosen: Sequence[int], seed: int) -> None:
        check_classes([self.labels[i] for i in chosen], self.classes, len(chosen), seed)

    def trial(self, setting: Setting) -> ImageTrial:
        return ImageTrial(self, setting)


class ImageTrial(LabelTrial):
    def __init__(self, target: ImageTarget, setting: Setting) -> None:
        features, head = setting.config.features, setting.config.head
        if features.kind not in ("learned", "random") or features.chars:
            raise UserError("pixels have no word vectors and no characters; features.kind learned or random is needed")
        self.graph, self.device = setting.graph, setting.device
        self.parts = PixelRows(target.units.units[list(setting.chosen)]), target.held
        self.labels = [target.labels[i] for i in setting.chosen], target.held_labels
        self.sizes = self.parts[0].lengths.tolist(), self.parts[1].lengths.tolist()
        self.test_batch = max(1, min(TEST_BATCH, 2**16 // self.sizes[0][0]))
        generator = torch.Generator().manual_seed(setting.seed)
        vectors = torch.randn(target.vocab_size, features.dim, generator=generator)
        torch.manual_seed(setting.seed)
        self.model = TextClassifier(
            WordTable({}, vectors).features(features),
            setting.graph,
            len(target.classes),
            features.states,
            head.kind,
            head.hidden,
            head.dropout,
            **mixing(setting.config),
        )
        self.patterns, self.counts = self.model.layer_patterns(), {}

    def scores(self, test: bool, indices: Sequence[int]) -> Tensor:
        units, lengths = (part.to(self.device) for part in self.parts[test].batch(indices))
        return self.model(units, lengths, self.graph.queries_keys(units, lengths))
