"""A trained document classifier: out of its checkpoint, or out of a file of adapters on a language model; texts in,
their classes out; and the mean of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glomo.data import AnyVocabulary, encode_labels, vocabulary_from_dict
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.training.adapted import Adapters, base_fingerprint, insert_adapters
from glomo.training.checkpoint import Checkpoint
from glomo.training.document_classifier import BESIDE, DocumentClassifier
from glomo.training.documents import figures_of, probabilities, units_of
from glomo.training.finetune_config import ClassifierConfig
from glomo.training.language_model import language_model
from glomo.training.models import OF_UNITS, load_language_weights, model_in
from glomo.training.names import Names, make_labels, name_scores
from glomo.training.slices import Slices, insert_slices
from glomo.training.texts import task_name
from glomo.transfer.structure import about_adapters, load_adapters


@dataclass
class TrainedClassifier:
    """A model with its vocabulary and the names of its classes."""

    path: str
    model: DocumentClassifier
    vocabulary: AnyVocabulary
    classes: list[str]
    length: int
    """units after which a document is cut; 0: none is"""
    backward: bool
    """it reads from the end to the beginning"""
    names: Names = field(default_factory=Names)
    """vectors or attributes of its labels"""
    task: str = ""
    """what it was trained on"""
    head: dict[str, Any] = field(default_factory=dict)
    """settings that its head is made from: hidden and slices"""

    def probabilities(
        self, texts: Sequence[str], device: torch.device | str = "cpu", names: Sequence[str] = ()
    ) -> Tensor:
        """(texts, classes); or (texts, names), the softmax of how near they are."""
        ids = [units_of(text, self.vocabulary, self.length, self.backward) for text in texts]
        model, on = self.model.to(device), torch.device(device)
        if not names:
            return probabilities(model, ids, on)
        if not self.names.given:
            raise UserError(
                f"{self.path} knows its classes only; names need a run with names.vectors or names.attributes"
            )
        seen, others = self.names.tables(self.classes, names)
        return name_scores(self.names, model, ids, seen, others, on).softmax(-1)


class TrainedEnsemble:
    """The mean of the probabilities of one or more classifiers, such as a forward and a backward one:

    .. code-block:: text

        p(y | x) = (1 / M) sum_m p_m(y | x)

    Raises:
        UserError: there is none, or they have other classes.
    """

    def __init__(self, members: Sequence[TrainedClassifier]) -> None:
        if not members:
            raise UserError("an ensemble needs at least one classifier")
        for member in members[1:]:
            if member.classes != members[0].classes:
                raise UserError(
                    f"{members[0].path} knows the classes {', '.join(members[0].classes)}, but {member.path} knows "
                    f"{', '.join(member.classes)}"
                )
        self.members, self.classes = members, members[0].classes

    def probabilities(
        self, texts: Sequence[str], device: torch.device | str = "cpu", names: Sequence[str] = ()
    ) -> Tensor:
        """(texts, classes), or (texts, names) for names of one's own. Raises UserError as `predict`."""
        return torch.stack([member.probabilities(texts, device, names) for member in self.members]).mean(0)

    def predict(self, texts: Sequence[str], device: torch.device | str = "cpu", names: Sequence[str] = ()) -> list[str]:
        """The most probable class of each text; or, of runs with [names], the nearest of these names, which may be of
        classes that training had no example of.

        Raises UserError for names without vectors or attributes, and where a run has none.
        """
        if not texts:
            return []
        chosen = self.probabilities(texts, device, names).argmax(-1).tolist()
        return [(names or self.classes)[n] for n in chosen]

    def evaluate(self, examples: Sequence[tuple[str, str]], device: torch.device | str = "cpu") -> dict[str, Any]:
        """{accuracy, loss, examples} on (text, label) examples. Raises UserError for a label that is unknown."""
        labels = encode_labels([label for _, label in examples], self.classes)
        found = self.probabilities([text for text, _ in examples], device)
        return {**figures_of(found, labels), "examples": len(examples)}


def load_classifier(*paths: str | Path, task: str = "") -> TrainedEnsemble:
    """The classifiers in checkpoint folders, or in run folders (``final/``), as one: those of [data]'s task, or of
    another one that has learned along ([tasks], or the old one of [close] lwf) under its name there.

    Raises UserError when a folder is missing, damaged, or holds no document classifier, for different classes, and for
    a task that it does not have.
    """
    return TrainedEnsemble([load_one(path, task=task) for path in paths])


def load_adapted(language_model_run: str | Path, adapters_file: str | Path) -> TrainedEnsemble:
    """The classifier of a file ``adapters.safetensors``, which `glomo finetune` writes with [adapter], on the language
    model that it was trained on: what `load_classifier` gives of the run's folder, which need not be there. Several
    tasks' files need one language model.

    Raises UserError when one of them is missing or damaged, and for another language model.
    """
    found, about = load_language_weights(language_model_run), about_adapters(adapters_file)
    model = language_model(found)
    if "classes" not in about:
        raise UserError(f"{adapters_file} has adapters, but no classes; a file of `glomo finetune` is needed")
    if base_fingerprint(model, about["learned"]) != about["base"]:
        raise UserError(
            f"{adapters_file} was trained on another language model than that of {language_model_run}, or on other "
            "weights of it; give the run folder that tune.init was"
        )
    classes = [str(name) for name in about["classes"]]
    classifier = DocumentClassifier(model, len(classes), **about["classifier"])
    load_adapters(classifier, adapters_file)
    length = int(about["length"])
    return TrainedEnsemble(
        [TrainedClassifier(str(adapters_file), classifier, found.vocabulary, classes, length, found.backward)]
    )


def load_one(path: str | Path, order: Sequence[str] = ("final", "best"), task: str = "") -> TrainedClassifier:
    """One of them, from the first folder of ``order`` in a run folder. Raises UserError as `load_classifier`."""
    with model_in(path, "document-classifier", "document classifier", order) as (found, vocabulary):
        meta, weights = found.meta, found.weights
        if task:
            meta, weights = _of_other_task(found, task)
            vocabulary = vocabulary_from_dict(meta["vocabulary"])
        config, settings = meta["config"], dict(meta["model"])
        settings.pop("classes")
        if meta["architecture"] == "lstm":
            encoder: LanguageModel | LSTMLanguageModel = LSTMLanguageModel(AWDLSTMConfig.from_dict(settings))
        else:
            encoder = LanguageModel(TransformerConfig.from_dict(settings))
        classes = [str(name) for name in meta["classes"]]
        names, table = Names(**config.get("names", {})), weights.get("labels.table", weights.get("labels.signatures"))
        outputs = len(classes) if table is None else table.size(1)
        model = DocumentClassifier(encoder, outputs, **ClassifierConfig(**config["classifier"]).of_model())
        model.labels = None if table is None else make_labels(names, classes, table)
        insert_adapters(Adapters(**config.get("adapter", {})), model)
        insert_slices(Slices(**config.get("slices", {})), model)
        model.load_state_dict({name: t for name, t in weights.items() if name.partition(".")[0] not in BESIDE})
        of = (vocabulary, classes, int(config["data"]["length"]), bool(meta["backward"]))
        return TrainedClassifier(str(path), model, *of, names, task or task_name(config["data"]), head_settings(config))


def head_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe's sections a head is made from."""
    return {"hidden": config["classifier"]["hidden"], "slices": config.get("slices", {})}


def _of_other_task(found: Checkpoint, task: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(meta, weights) as if the classifier had been trained on another of its tasks."""
    others: dict[str, Any] = found.meta.get("others", {})
    if task not in others:
        along = f"of {', '.join(others)}" if others else "of no other task"
        if not others and any(name.startswith(("others.", "old_head.")) for name in found.weights):
            along = "that an older version has kept without their classes; the run has to be trained again"
        raise UserError(f"there is no head of the task {task!r} beside its own; there are heads {along}")
    other, meta = others[task], dict(found.meta)
    config = {**meta["config"], "names": {}, "slices": other["head"]["slices"]}
    config["classifier"] = {**config["classifier"], "hidden": other["head"]["hidden"]}
    weights = {name: t for name, t in found.weights.items() if name.partition(".")[0] not in ("head", "labels")}
    before = f"{other['part']}."
    weights |= {f"head.{name.removeprefix(before)}": t for name, t in weights.items() if name.startswith(before)}
    if other["vocabulary"]:
        meta |= {"vocabulary": other["vocabulary"]}
        table = weights[f"embeddings.{task}.weight"]
        meta["model"] = {**meta["model"], "vocab_size": len(table) - 1}  # the model adds one
        for name in OF_UNITS[meta["architecture"]]:
            weights[f"language_model.{name}"] = table if name.endswith("weight") else table.new_zeros(len(table))
    return {**meta, "config": config, "classes": other["classes"]}, weights
