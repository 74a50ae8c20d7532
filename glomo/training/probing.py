"""Probing a trained run: what each layer of a language model, or of a classifier on one, tells of labelled texts."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from glomo.data import AnyVocabulary, catalogue, encode_labels, label_names, pad, read_labelled, read_texts
from glomo.data.vocabulary import split_words
from glomo.errors import UserError
from glomo.nn.awd_lstm import LSTMLanguageModel
from glomo.training import checkpoint
from glomo.training.config import check_range
from glomo.training.documents import units_of
from glomo.training.language import AnyLanguageModel
from glomo.training.language_model import load_language_model
from glomo.training.trained_classifier import load_classifier
from glomo.transfer.probing import (
    ProbeSettings,
    Selectivity,
    SurfaceTask,
    content_task,
    layer_features,
    length_task,
    probe_layers,
    shift_task,
)
from glomo.transfer.probing.splits import seeded

SURFACE = ("length", "content", "shift")
_BATCH = 32


@dataclass(frozen=True)
class ProbeOptions:
    """What is asked of the layers, and of which texts."""

    task: str
    """length, content, shift, label (of a data set), or a file of labelled texts"""
    text: str | None = None
    """a file of texts, for length, content and shift"""
    column: str = "text"
    """of that file"""
    dataset: str | None = None
    """a data set of the catalogue in the place of a file"""
    split: str = "train"
    """of the data set"""
    text_column: str = "text"
    """of the labelled file"""
    label_column: str = "label"
    kind: Literal["linear", "mlp", "both"] = "both"
    pool: Literal["mean", "last", "max"] = "mean"
    """what becomes of the units of a text"""
    limit: int = 10_000
    """most texts"""
    length: int = 256
    """units after which a text is cut; of surface tasks longer texts are left out"""
    words: int = 1000
    """of content: how many words"""
    first_rank: int = 2000
    """of content: so many more frequent words are left out"""
    per_word: int = 120
    """of content: texts of each word, at least"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "length", "words", "per_word"):
            check_range(f"--{name}", getattr(self, name), 1)
        check_range("--first-rank", self.first_rank, 0)
        check_range("--seed", self.seed, 0, 2**63 - 1)
        if self.text and self.dataset:
            raise UserError("the texts are given twice, by --text and by --dataset; one of them is needed")
        if self.task in SURFACE and not (self.text or self.dataset):
            raise UserError(f"the task {self.task} is made of texts: --text FILE or --dataset NAME is needed")
        if self.task == "label" and not self.dataset:
            raise UserError("the task label is that of a data set: --dataset NAME is needed")
        if self.task not in (*SURFACE, "label") and (self.text or self.dataset):
            raise UserError(f"the texts are those of {self.task}; --text and --dataset go with other tasks")


def probe_run(run: str | Path, options: ProbeOptions, out: Path) -> dict[str, Any]:
    """Probe every layer of the model in a run's folder, linearly and with a hidden layer, beside a control task, whose
    random labels are a function of a text's first word. ``out/results.json`` holds what is returned.

    Raises UserError for a folder without a language model or classifier, and for texts and tasks that do not fit.
    """
    model, vocabulary, backward, longest = load_model(run)
    try:
        length = min(longest, options.length)
        task = labelled_texts(options, lambda text: len(vocabulary.encode(text)) <= length)
        features = text_features(model, vocabulary, backward, task.texts, length, options.pool)
        words = [(vocabulary.tokens(text) or [""])[0] for text in task.texts]
        results = {
            kind: probe_layers(
                features, torch.tensor(task.labels), settings=ProbeSettings(kind, seed=options.seed), words=words
            )
            for kind in ("linear", "mlp")
            if options.kind in (kind, "both")
        }
    except ValueError as error:
        raise UserError(f"{options.task}: {error}") from None
    rows = [_row(kind, layer, result) for kind, layers in results.items() for layer, result in layers.items()]
    given = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    kept = {"run": str(run), **given, "texts": len(task.texts), "left_out": task.left_out, "classes": task.classes}
    found = {**kept, "probes": rows}
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.replace_file(out / "results.json", (json.dumps(found, indent=1) + "\n").encode())
    return found


def load_model(run: str | Path) -> tuple[AnyLanguageModel, AnyVocabulary, bool, int]:
    """(language model, vocabulary, whether it reads backward, units that it can read) of a run of `glomo lm train` or
    `glomo finetune`, or of a checkpoint. Raises UserError as `load_language_model` and `load_classifier` do."""
    if _kind(Path(run)) == "document-classifier":
        member = load_classifier(run).members[0]
        model = member.model.language_model
        longest = sys.maxsize if isinstance(model, LSTMLanguageModel) else member.model.chunk
        return model, member.vocabulary, member.backward, longest
    trained = load_language_model(run)
    return trained.model, trained.vocabulary, trained.backward, trained.max_length


def labelled_texts(options: ProbeOptions, fits: Callable[[str], bool]) -> SurfaceTask:
    """The task's texts and labels; surface tasks are made of texts that fit into the model, others are cut.

    Raises UserError, and ValueError where texts make no task.
    """
    if options.task in SURFACE:
        given = read_texts(options.text, options.column) if options.text else _texts(options)
        texts = _some([text for text in given if fits(text)], options)
        task = _surface(options, texts)
        return dataclasses.replace(task, left_out=len(given) - len(task.texts))
    if options.task == "label":
        examples = catalogue.load_labelled(str(options.dataset), options.split)
    else:
        examples = read_labelled(options.task, options.text_column, options.label_column)
    kept = _some(examples, options)
    classes = label_names(kept)
    labels = encode_labels([label for _, label in kept], classes)
    left_out = len(examples) - len(kept)
    return SurfaceTask([text for text, _ in kept], labels, classes, list(range(len(kept))), left_out)


def text_features(
    model: AnyLanguageModel,
    vocabulary: AnyVocabulary,
    backward: bool,
    texts: Sequence[str],
    length: int,
    pool: Literal["mean", "last", "max"],
) -> dict[str, Tensor]:
    """{layer: (texts, width)} of the embeddings and of every layer."""
    is_lstm = isinstance(model, LSTMLanguageModel)
    first, layers = ("encoder.embedding", "encoder.layers") if is_lstm else ("decoder.positions", "decoder.layers")
    modules = {"embeddings": first, **{f"layer {n + 1}": f"{layers}.{n}" for n in range(model.config.layers)}}
    ids = [units_of(text, vocabulary, length, backward) for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # texts of one length pad each other little
    batches = [pad([ids[i] for i in order[start : start + _BATCH]]) for start in range(0, len(order), _BATCH)]
    found = layer_features(
        model,
        list(modules.values()),
        (units for units, _ in batches),
        (lengths for _, lengths in batches),
        pool,
        forward=model.encoder if isinstance(model, LSTMLanguageModel) else model.hidden,
    )
    back = torch.tensor(order).argsort()
    return {title: found[name][back] for title, name in modules.items()}


def _surface(options: ProbeOptions, texts: Sequence[str]) -> SurfaceTask:
    generator = seeded(options.seed, "task")
    tokenize = partial(split_words, lowercase=False)
    if options.task == "length":
        return length_task(texts, generator, tokenize=tokenize)
    if options.task == "shift":
        return shift_task(texts, generator, tokenize)
    return content_task(texts, generator, options.words, options.first_rank, options.per_word, tokenize)


def _texts(options: ProbeOptions) -> list[str]:
    name = str(options.dataset)
    if catalogue.find(name, "texts", "labelled").kind == "texts":
        return catalogue.load_texts(name, options.split)
    return [text for text, _ in catalogue.load_labelled(name, options.split)]


def _some(items: Sequence[Any], options: ProbeOptions) -> list[Any]:
    """At most so many, drawn, in their order."""
    order = torch.randperm(len(items), generator=seeded(options.seed, "texts"))
    return [items[i] for i in sorted(order[: options.limit].tolist())]


def _row(kind: str, layer: str, result: Any) -> dict[str, Any]:
    assert isinstance(result, Selectivity)
    task = result.task
    figures = {"accuracy": task.accuracy, "majority": task.majority, "control": result.control.accuracy}
    return {"kind": kind, "layer": layer, **figures, "selectivity": result.selectivity, "examples": task.examples}


def _kind(folder: Path) -> str | None:
    """What a checkpoint says that it is; None where there is none to be read, of which its loader will speak."""
    for place in (folder, folder / "final", folder / "best"):
        try:
            meta = json.loads((place / checkpoint.META).read_bytes())
        except (OSError, ValueError):
            continue
        return str(meta.get("kind")) if isinstance(meta, dict) else None
    return None
