"""Fine-tuning: labelled documents in, a classifier on a language model's encoder out, in a run folder."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.data import AnyVocabulary, BucketBatches, Vocabulary, encode_labels, label_names, pad
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.training import checkpoint, language
from glomo.training.config import check_range, to_dict
from glomo.training.distributed import World
from glomo.training.document_classifier import DocumentClassifier, layer_patterns
from glomo.training.language_model import language_model
from glomo.training.loop import Task, set_up, train
from glomo.training.memory import PeakMemory
from glomo.training.models import load_language_weights, model_meta
from glomo.training.run_folder import RunFolder
from glomo.training.texts import LabelledData, fingerprint, labelled, sample
from glomo.training.train_config import TrainConfig
from glomo.training.tune import Tune, make_stages
from glomo.transfer import auxiliary_weight, layer_groups

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class FinetuneData(LabelledData):
    """The [data] section: the labelled task."""

    valid: float = 0.1
    """share of these that is held out for validation; 0: none"""
    length: int = 0
    """units after which a document is cut; 0: it is read to its end, however long"""
    vocab_size: int = 20_000
    """most words in the vocabulary, without tune.init"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("data.valid", self.valid, 0, 0.9)
        check_range("data.length", self.length, 0)


@dataclass(frozen=True)
class ClassifierConfig:
    """The [classifier] section: what stands on the language model."""

    model: Literal["transformer", "lstm"] = "lstm"
    """the language model without tune.init, with its settings in [model] or [lstm]; with it, only the dropouts there
    count"""
    drop_mult: float = 1.0
    """of lstm: all five dropouts times this"""
    hidden: int = 50
    """width between the head's two blocks"""
    dropout: float = 0.4
    """of the pooled features"""
    dropout_last: float = 0.1
    """before the last linear layer"""
    chunk: int = 70
    """units read at a time"""
    window: int = 20
    """chunks of a document, counted from its end, through which gradients go"""
    layers: Literal["last", "mix"] = "last"
    """features of the last layer, or a learned mixture of all"""
    auxiliary: float = 0.0
    """weight of the language model's loss on the same documents; with sequential it is annealed from 0.2 to 0.1 by
    itself"""
    smoothing: float = 0.0
    """label smoothing"""

    def of_model(self) -> dict[str, Any]:
        """Arguments of `DocumentClassifier`."""
        options = {name: getattr(self, name) for name in ("hidden", "chunk", "window", "layers")}
        return {**options, "dropouts": (self.dropout, self.dropout_last)}

    def __post_init__(self) -> None:
        for name in ("hidden", "chunk", "window"):
            check_range(f"classifier.{name}", getattr(self, name), 1)
        for name in ("dropout", "dropout_last", "smoothing"):
            check_range(f"classifier.{name}", getattr(self, name), 0, 0.999)
        for name in ("auxiliary", "drop_mult"):
            check_range(f"classifier.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning recipe."""

    DERIVED: ClassVar = {"model": ("vocab_size", "encoder_attention", "smoothing"), "lstm": ("vocab_size",)}

    data: FinetuneData = field(default_factory=FinetuneData)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    lstm: AWDLSTMConfig = field(default_factory=lambda: AWDLSTMConfig.preset("classifier"))
    tune: Tune = field(default_factory=Tune)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Documents:
    """Documents as units, with their labels as numbers."""

    ids: list[list[int]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, indices: Sequence[int]) -> Documents:
        return Documents([self.ids[i] for i in indices], [self.labels[i] for i in indices])

    def tensors(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(units, lengths, labels) of some."""
        units, lengths = pad([self.ids[i] for i in indices])
        labels = torch.tensor([self.labels[i] for i in indices])
        return units.to(device), lengths.to(device), labels.to(device)


def finetune(config: FinetuneConfig, out: Path) -> dict[str, Any]:
    """Run a recipe: then ``out/final`` holds a classifier for `load_classifier`, and ``out/results.json`` what is
    returned: accuracy and loss on the test set, parameters, seconds, and the peak of memory in bytes.

    With several processes BatchNorm takes its statistics of each one's share of the batch; all else is as with one.

    Raises UserError for mistakes in the recipe and in the data.
    """
    if config.train.shard:
        raise UserError("train.shard divides the models of `glomo lm` and `glomo translate`; a classifier is whole")
    world = set_up(config.train)
    work = prepare(config, world)
    config = work.config
    memory = PeakMemory(world.device)
    if world.rank:
        return train(work.task, config.train, None, world)
    with RunFolder(out, to_dict(config)) as folder:
        row = train(work.task, config.train, folder, world)
        work.model.load_state_dict(checkpoint.load(folder.final).weights)
        results: dict[str, Any] = {
            f"test_{name}": value for name, value in evaluate(work.model, work.test, world.device).items()
        }
        if len(work.valid):
            figures = evaluate(work.model, work.valid, world.device)
            results |= {f"valid_{name}": value for name, value in figures.items()}
        results |= {name: row[name] for name in ("step", "loss", "seconds")}
        results |= {"examples": work.examples, "parameters": sum(p.numel() for p in work.model.parameters())}
        results |= {"trainable": most_trainable(work.task), "memory": memory.bytes()}
        results |= {"budget": config.train.steps}
        kept = folder.path / "results.json"
        if kept.exists():  # a finished run that was called again has taken no memory
            results |= {"memory": json.loads(kept.read_bytes()).get("memory")}
        checkpoint.replace_file(kept, (json.dumps(results, indent=1) + "\n").encode())
        return results


@dataclass(frozen=True)
class Work:
    """All that a recipe trains and tests."""

    config: FinetuneConfig
    """with the sizes of the language model in tune.init"""
    task: Task
    model: DocumentClassifier
    valid: Documents
    test: Documents
    examples: int
    """documents to train on"""


def prepare(config: FinetuneConfig, world: World) -> Work:
    """The task of a recipe. Raises UserError as `finetune`."""
    train_set, test_set = labelled(config.data)
    classes = label_names(train_set)
    model, vocabulary, backward = make_classifier(config, len(classes), [text for text, _ in train_set])
    if config.tune.init:
        sizes = language.with_sizes(config.model, config.lstm, model.language_model, config.tune.init)
        config = dataclasses.replace(config, **sizes)
    documents, test = (
        encode(examples, vocabulary, classes, config.data.length, backward) for examples in (train_set, test_set)
    )
    chosen, held = draw(documents, classes, config.data, config.train.seed)
    fitting, valid = documents.part(chosen), documents.part(held)
    batches = BucketBatches([len(ids) for ids in fitting.ids], config.train.batch_size, config.train.seed)
    weight = config.classifier.auxiliary

    def before_step(step: int) -> float:
        nonlocal weight
        if config.tune.method == "sequential":
            weight = auxiliary_weight((step - 1) // (config.tune.stage_steps or len(batches)))
        return 1.0

    def loss(indices: list[int], generator: torch.Generator) -> tuple[Tensor, int, int]:
        units, lengths, labels = fitting.tensors(indices, world.device)
        value = model.loss(units, lengths, labels, weight, config.classifier.smoothing)
        return value, len(indices), int(lengths.sum())

    def validate() -> dict[str, float]:
        figures = evaluate(model, valid, world.device)
        return {"valid_loss": figures["loss"], "valid_accuracy": figures["accuracy"]}

    settings = {**model.language_model.config.to_dict(), "classes": len(classes)}
    meta = model_meta("document-classifier", settings, vocabulary, to_dict(config))
    meta |= {"classes": classes, "architecture": architecture(model), "backward": backward}
    identity = {"vocabulary": vocabulary.fingerprint, "task": fingerprint("\t".join(e) for e in train_set + test_set)}
    task = Task(model, batches, loss, validate if held else None, meta, identity, "finetune", before_step=before_step)
    task.groups = layer_patterns(model, language.layer_patterns(model.language_model))
    task.stages = make_stages(config.tune, config.train, len(batches))
    return Work(config, task, model, valid, test, len(fitting))


def make_classifier(
    config: FinetuneConfig, classes: int, texts: Sequence[str]
) -> tuple[DocumentClassifier, AnyVocabulary, bool]:
    """(a classifier on the language model in tune.init, or on a new one; its vocabulary; whether it reads backward)."""
    settings = config.classifier
    if config.tune.init:
        found = load_language_weights(config.tune.init)
        dropouts = config.lstm.scaled(settings.drop_mult) if found.architecture == "lstm" else config.model
        given = {name: value for name, value in dropouts.to_dict().items() if name.startswith(("drop", "weight_drop"))}
        encoder = language_model(dataclasses.replace(found, model={**found.model, **given}))
        vocabulary, backward = found.vocabulary, found.backward
    else:
        vocabulary, backward = Vocabulary.build(texts, config.data.vocab_size), False
        if settings.model == "lstm":
            lstm = dataclasses.replace(config.lstm.scaled(settings.drop_mult), vocab_size=len(vocabulary))
            encoder = LSTMLanguageModel(lstm)
        else:
            encoder = LanguageModel(dataclasses.replace(config.model, vocab_size=len(vocabulary), smoothing=0.0))
    return DocumentClassifier(encoder, classes, **settings.of_model()), vocabulary, backward


def encode(
    examples: Sequence[tuple[str, str]], vocabulary: AnyVocabulary, classes: Sequence[str], length: int, backward: bool
) -> Documents:
    """Texts to units, labels to numbers (UserError: unknown)."""
    labels = encode_labels([label for _, label in examples], classes)
    return Documents([units_of(text, vocabulary, length, backward) for text, _ in examples], labels)


def units_of(text: str, vocabulary: AnyVocabulary, length: int, backward: bool) -> list[int]:
    """At most `length` units (0: all), in the order in which they are read; at least one."""
    units = vocabulary.encode(text)[: length or None] or [vocabulary.unk_id]
    return units[::-1] if backward else units


def draw(documents: Documents, classes: Sequence[str], data: FinetuneData, seed: int) -> tuple[list[int], list[int]]:
    """(documents to train on, documents held out for validation).

    Raises UserError where a class has no document to train on.
    """
    everything = sample(len(documents), data.labels, seed)
    shuffled = random.Random(f"valid {seed}").sample(everything, len(everything))
    count = int(data.valid * len(everything))
    held, kept = sorted(shuffled[:count]), sorted(shuffled[count:])
    counts = Counter(documents.labels[i] for i in kept)
    empty = [name for number, name in enumerate(classes) if not counts[number]]
    if empty:
        raise UserError(
            f"the class {empty[0]!r} has no example among the {len(kept)} to train on; with data.labels = "
            f"{data.labels} and data.valid = {data.valid} another train.seed, or more labels, are needed"
        )
    return kept, held


@torch.no_grad()
def probabilities(model: DocumentClassifier, ids: Sequence[list[int]], device: torch.device) -> Tensor:
    """(documents, classes), in fp32 on the CPU."""
    model.eval()
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = torch.empty(0)
    for start in range(0, len(order), EVALUATION_BATCH):
        part = order[start : start + EVALUATION_BATCH]
        units, lengths = pad([ids[i] for i in part])
        values = model(units.to(device), lengths.to(device)).float().softmax(-1).cpu()
        found = found if len(found) else torch.empty(len(ids), values.size(1))
        found[part] = values
    return found


def evaluate(model: DocumentClassifier, documents: Documents, device: torch.device) -> dict[str, float]:
    """{accuracy, loss}: share of right answers, mean nats."""
    return figures_of(probabilities(model, documents.ids, device), documents.labels)


def figures_of(found: Tensor, labels: Sequence[int]) -> dict[str, float]:
    target = torch.tensor(labels)
    right = int((found.argmax(-1) == target).sum())
    return {"accuracy": right / len(labels), "loss": float(F.nll_loss(found.clamp(min=1e-30).log(), target))}


def most_trainable(task: Task) -> int:
    """Parameters that learn in the stage in which most do."""
    assert task.stages is not None
    groups = layer_groups(task.model, task.groups)
    sizes = {group.name: group.size for group in groups}
    return max(sum(sizes[name] for name in stage.rates) for stage in task.stages(groups))


def architecture(model: DocumentClassifier) -> str:
    return "lstm" if isinstance(model.language_model, LSTMLanguageModel) else "transformer"
