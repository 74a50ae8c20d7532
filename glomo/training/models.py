"""Trained models on the disk: what others need of a run's checkpoint, and how it is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from glomo.data import AnyVocabulary, vocabulary_from_dict
from glomo.errors import UserError
from glomo.nn import FrozenGraph, GLoMoConfig
from glomo.pretrained import FOLDER, pretrained_names
from glomo.training import checkpoint
from glomo.transfer.vocabulary import converted_rows


def model_meta(kind: str, model: dict[str, Any], vocabulary: AnyVocabulary, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's meta.json says so that its model can be used without the run that made it."""
    return {
        "kind": kind,
        "model": model,
        "vocabulary": vocabulary.to_dict(),
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "config": config,
    }


def graph_meta(model: GLoMoConfig, vocabulary: AnyVocabulary, config: dict[str, Any]) -> dict[str, Any]:
    """`model_meta` of a graph."""
    return model_meta("graph", model.to_dict(), vocabulary, config)


@contextlib.contextmanager
def model_in(
    path: str | Path, kind: str | tuple[str, ...], what: str, order: Sequence[str] = ("final", "best")
) -> Iterator[tuple[checkpoint.Checkpoint, AnyVocabulary]]:
    """(checkpoint, vocabulary) of a checkpoint folder, or of the first one of ``order`` in a run folder.

    Raises UserError when the folder is missing, damaged, or holds a model of another kind than ``what``, when the
    vocabulary is not the one that the model was trained with, and when the block that makes the model of it cannot.
    """
    folder = Path(path)
    inside = [folder / name for name in order if (folder / name / checkpoint.META).is_file()]
    if inside and not (folder / checkpoint.META).exists():
        folder = inside[0]
    found = checkpoint.load(folder)
    if found.meta.get("kind") not in ((kind,) if isinstance(kind, str) else kind):
        raise UserError(f"{folder} holds no {what} but a checkpoint of the kind {found.meta.get('kind')!r}")
    try:
        vocabulary = vocabulary_from_dict(found.meta["vocabulary"])
        trained_with, size = found.meta["vocabulary_fingerprint"], found.meta["model"]["vocab_size"]
        if vocabulary.fingerprint != trained_with:
            raise UserError(
                f"the vocabulary is {vocabulary.fingerprint[:12]} of {len(vocabulary)} units, but the {what} was "
                f"trained with {trained_with[:12]} of {size} units"
            )
        yield found, vocabulary
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "loading state_dict" not in str(error):
            raise
        where, reason = folder / checkpoint.META, f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(
            f"{where} is damaged and describes no {what} ({reason}); use another checkpoint, or train again"
        ) from None


def load_graph(path: str | Path) -> FrozenGraph:
    """The graph in a checkpoint folder, or in a run folder (its ``best/`` if there is one, else its ``final/``); where
    there is no such folder, the graph of that name that comes with the package (`glomo.load_pretrained`).

    Raises UserError when the folder is missing, damaged, or holds no graph, and when its vocabulary is not the one that
    the graph was trained with.
    """
    if str(path) in pretrained_names() and not Path(path).exists():
        path = FOLDER / str(path)
    with model_in(path, "graph", "graph", ("best", "final")) as (found, vocabulary):
        return FrozenGraph.restore(found.meta["model"], vocabulary, found.weights)


# settings that came after graphs were in use, and that no graph in use depends on
LATER = ("l1_weight",)


def graph_fingerprint(graph: FrozenGraph, kind: str) -> str:
    """A hash of what runs on a graph depend on: those of the graph `learned` on its vocabulary, settings and weights,
    those of `random` on the first two, and those of another control on the vocabulary."""
    digest = hashlib.sha256(graph.vocabulary.fingerprint.encode())
    if kind in ("random", "learned"):
        settings = {key: value for key, value in graph.config.to_dict().items() if key not in LATER}
        digest.update(json.dumps(settings, sort_keys=True).encode())
    if kind == "learned":
        for name, value in graph.state_dict().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def export_graph(path: str | Path, folder: Path) -> int:
    """Write what `load_graph` needs of a graph, its weights in half precision, to ``folder``; returns its bytes.

    Raises UserError as `load_graph` does, and for a folder that is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another folder")
    with model_in(path, "graph", "graph", ("best", "final")) as (found, vocabulary):
        FrozenGraph.restore(found.meta["model"], vocabulary, found.weights)  # fits, or is a sentence
    prefix = "graph_predictor."
    weights = {name: value.half() for name, value in found.weights.items() if name.startswith(prefix)}
    lost = [name for name, value in weights.items() if not value.isfinite().all()]
    if lost:
        raise UserError(f"{lost[0]} has numbers that half precision cannot hold")
    kept = ("kind", "model", "vocabulary", "vocabulary_fingerprint", "config", "step", "valid_loss")
    checkpoint.save(folder, weights, None, {name: found.meta[name] for name in kept if name in found.meta})
    return sum(file.stat().st_size for file in folder.iterdir())


END = "\0end"
"""A name that no unit of a vocabulary has, for the one that a language model adds."""
OF_UNITS = {"transformer": ("embedding.weight",), "lstm": ("encoder.embedding.weight", "decoder.bias")}
"""Weights of a language model with a row for each unit."""
SIZES = {
    "transformer": (
        "dim",
        "heads",
        "layers",
        "ff",
        "norm",
        "positions",
        "max_length",
        "max_distance",
        "decoder_attention",
    ),
    "lstm": ("dim", "hidden", "layers"),
}
"""Settings of a language model that its weights are made for."""


@dataclass(frozen=True)
class LanguageWeights:
    """A language model as its checkpoint holds it."""

    path: str
    architecture: str
    """transformer or lstm"""
    backward: bool
    model: dict[str, Any]
    vocabulary: AnyVocabulary
    weights: dict[str, Tensor]
    data: dict[str, Any]
    """the [data] section that it was trained with"""

    @property
    def sizes(self) -> dict[str, Any]:
        """The settings that its weights are made for."""
        given = {name: self.model[name] for name in SIZES[self.architecture]}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

    def check(self, architecture: str, backward: bool) -> None:
        """Raises UserError unless it is of this kind and direction."""
        direction = {True: "backward", False: "forward"}
        found, needed = (
            f"{direction[way]} {kind}" for kind, way in ((self.architecture, self.backward), (architecture, backward))
        )
        if found != needed:
            raise UserError(
                f"{self.path} holds a {found} language model; method.model and method.backward say {needed}"
            )

    def for_vocabulary(self, vocabulary: AnyVocabulary) -> dict[str, Tensor]:
        """The weights with a row for each unit of another vocabulary: its own, or the mean of all."""
        if vocabulary.fingerprint == self.vocabulary.fingerprint:
            return self.weights
        old, new = ([*v.units(), END] for v in (self.vocabulary, vocabulary))
        rows = {name: converted_rows(self.weights[name], old, new) for name in OF_UNITS[self.architecture]}
        return {**self.weights, **rows}


def load_language_weights(path: str | Path, order: Sequence[str] = ("best", "final")) -> LanguageWeights:
    """The language model in a checkpoint folder, or in a run folder (its ``best/`` if there is one, else ``final/``);
    a document classifier's is the one that it was made of, as fine-tuning has left it.

    Raises UserError as `model_in` does, and for a language model that needs its adapters.
    """
    with model_in(path, ("language-model", "document-classifier"), "language model", order) as (found, vocabulary):
        config = found.meta["config"]
        if found.meta["kind"] == "document-classifier":
            return _of_classifier(str(path), found, vocabulary)
        method = config.get("method", {})
        return LanguageWeights(
            str(path),
            str(method.get("model", "transformer")),
            bool(method.get("backward", False)),
            dict(found.meta["model"]),
            vocabulary,
            found.weights,
            dict(config["data"]),
        )


def _of_classifier(path: str, found: checkpoint.Checkpoint, vocabulary: AnyVocabulary) -> LanguageWeights:
    kind = found.meta["config"].get("adapter", {}).get("kind", "none")
    if kind != "none":
        raise UserError(f"its language model has adapters (adapter.kind = {kind!r}) and is none without them")
    prefix, model = "language_model.", dict(found.meta["model"])
    model.pop("classes")
    weights = {name.removeprefix(prefix): t for name, t in found.weights.items() if name.startswith(prefix)}
    architecture, backward = str(found.meta["architecture"]), bool(found.meta["backward"])
    data = {"length": found.meta["config"]["classifier"]["chunk"]}
    return LanguageWeights(path, architecture, backward, model, vocabulary, weights, data)
