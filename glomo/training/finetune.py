"""Fine-tuning: labelled documents in, a classifier on a language model's encoder out, in a run folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.data import AnyVocabulary, BucketBatches, Vocabulary
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.nn.pooling import PoolingHead
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.training import checkpoint, language
from glomo.training.adapted import FILE, Adapters, insert_adapters, save_adapted
from glomo.training.close import Close, check_learns, make_penalty, with_penalty
from glomo.training.config import check_range, default_values, to_dict
from glomo.training.distil import Distil, Teachers
from glomo.training.distributed import World
from glomo.training.document_classifier import BESIDE, DocumentClassifier, layer_patterns
from glomo.training.documents import Documents, FinetuneData, draw, encode, evaluate, figures_of, probabilities
from glomo.training.language_model import language_model
from glomo.training.loop import Batches, Task, set_up, train
from glomo.training.memory import PeakMemory
from glomo.training.models import load_language_weights, model_meta
from glomo.training.names import LabelSpace, NamedTask, Names, check_alone
from glomo.training.old_head import OldHead
from glomo.training.old_predictions import OldPredictions
from glomo.training.run_folder import RunFolder
from glomo.training.slices import SlicedExamples, Slices, insert_slices
from glomo.training.staging import Staging
from glomo.training.tasks import OtherTasks, Tasks, read_tasks
from glomo.training.texts import Labelled, fingerprint, labelled
from glomo.training.train_config import TrainConfig
from glomo.training.tune import Tune, make_stages
from glomo.training.unlabelled import Unlabelled, UnlabelledTexts
from glomo.transfer import auxiliary_weight


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

    def head(self, width: int, classes: int) -> PoolingHead:
        """A new head, as that of `DocumentClassifier`."""
        return PoolingHead(width, classes, self.hidden, (self.dropout, self.dropout_last))

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
    adapter: Adapters = field(default_factory=Adapters)
    close: Close = field(default_factory=Close)
    distil: Distil = field(default_factory=Distil)
    unlabelled: Unlabelled = field(default_factory=Unlabelled)
    tasks: Tasks = field(default_factory=Tasks)
    slices: Slices = field(default_factory=Slices)
    names: Names = field(default_factory=Names)


def finetune(config: FinetuneConfig, out: Path) -> dict[str, Any]:
    """Run a recipe: then ``out/final`` holds a classifier for `load_classifier`, and ``out/results.json`` what is
    returned: accuracy and loss on the test set, parameters, seconds, and the peak of memory in bytes; with unseen
    classes in [names] these are of the others, and "zero_shot" has `NamedTask.figures`. With [adapter] on the language
    model in tune.init, without [slices] and [names], ``out/adapters.safetensors`` holds all that has learned, for
    `load_adapted`.

    With several processes BatchNorm takes its statistics of each one's share of the batch, [unlabelled] and [slices]
    their means, and the hinge of [names] its nearest others; all else is as with one.

    Raises UserError for mistakes in the recipe and in the data.
    """
    if config.classifier.smoothing and (config.distil.teachers or config.unlabelled.method != "none"):
        raise UserError(
            "distil.teachers and unlabelled.method go without label smoothing; set classifier.smoothing = 0"
        )
    if config.distil.teachers and config.unlabelled.tsa != "none":
        raise UserError("unlabelled.tsa anneals the labels' loss, which distil.teachers replace; give one of them")
    if config.train.shard:
        raise UserError("train.shard divides the models of `glomo lm` and `glomo translate`; a classifier is whole")
    if config.adapter and config.tune.layers >= 0:
        raise UserError(
            f"tune.layers is {config.tune.layers}, and with adapter.kind = {config.adapter.kind!r} the layers above "
            "would stay as they are drawn; give one of them"
        )
    if config.names.vectors:
        others = (bool(config.distil.teachers), config.unlabelled.method != "none", bool(config.slices.patterns))
        check_alone(config.names, *others, config.classifier.smoothing)
    world = set_up(config.train)
    work = prepare(config, world)
    config = work.config
    memory = PeakMemory(world.device)
    if world.rank:
        return train(work.task, config.train, None, world)
    with RunFolder(out, to_dict(config), defaults=default_values(config)) as folder:
        row = train(work.task, config.train, folder, world)
        work.model.load_state_dict(checkpoint.load(folder.final).weights)
        said = probabilities(work.model, work.test.ids, world.device)
        tested = figures_of(said, work.test.labels)
        results: dict[str, Any] = {f"test_{name}": value for name, value in tested.items()}
        if len(work.valid):
            figures = evaluate(work.model, work.valid, world.device)
            results |= {f"valid_{name}": value for name, value in figures.items()}
        if work.named.unseen:
            results |= {"zero_shot": work.named.figures(work.model, work.test, work.withheld, world.device)}
        results |= {name: row[name] for name in ("step", "loss", "seconds")}
        results |= {"examples": work.examples, "parameters": sum(p.numel() for p in work.model.parameters())}
        results |= {"trainable": work.trainable, "memory": memory.bytes(), "budget": config.train.steps}
        if work.tasks is not None:
            results |= {"tasks": work.tasks.figures(world.device)}
        if work.slices is not None:
            results |= {"slices": work.slices.figures(said, work.test.labels)}
        kept = folder.path / "results.json"
        if kept.exists():  # a finished run that was called again has taken no memory
            results |= {"memory": json.loads(kept.read_bytes()).get("memory")}
        if config.adapter and config.tune.init and not (config.slices.patterns or config.names.vectors):
            for name in BESIDE:
                setattr(work.model, name, None)
            save_adapted(work.model, folder.path / FILE, about_adapted(work))
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
    named: NamedTask
    withheld: Documents
    """of the unseen classes of `named`"""
    examples: int
    """documents to train on"""
    trainable: int
    """parameters that learn in the stage in which most do"""
    tasks: OtherTasks | None
    slices: SlicedExamples | None


def resolved(config: FinetuneConfig) -> FinetuneConfig:
    """The recipe with the sizes of the language model in tune.init: what a run folder records."""
    if not config.tune.init:
        return config
    found = load_language_weights(config.tune.init)
    return dataclasses.replace(config, **language.with_sizes(config.model, config.lstm, found))


def prepare(config: FinetuneConfig, world: World) -> Work:
    """The task of a recipe. Raises UserError as `finetune`."""
    config.slices.check(config.distil.teachers, config.unlabelled.tsa, config.classifier.smoothing)
    config = resolved(config)
    named = NamedTask(config.names, *labelled(config.data), config.train.seed)
    train_set, test_set, classes = named.train, named.test, named.seen
    others = read_tasks(config.tasks, config.data, config.tune, config.classifier.layers)
    texts = [text for text, _ in train_set + [example for other in others for example in other.train]]
    model, vocabulary, backward = make_classifier(config, named.outputs, texts)
    named.insert(model)

    def encoded(examples: Labelled, names: list[str]) -> Documents:
        return encode(examples, vocabulary, names, config.data.length, backward)

    documents, test, withheld = (encoded(part, named.classes) for part in (train_set, test_set, named.withheld))
    chosen, held = draw(documents, classes, config.data, config.train.seed)
    fitting, valid = documents.part(chosen), documents.part(held)
    batches: Batches = BucketBatches([len(ids) for ids in fitting.ids], config.train.batch_size, config.train.seed)
    tasks = None
    if others:
        heads = (config.classifier.head, config.classifier.smoothing)
        tasks = OtherTasks(config.tasks, others, model, fitting, encoded, *heads, config.train)
        batches = tasks.batches
    weight = config.classifier.auxiliary
    read = [train_set[i][0] for i in chosen]
    teachers = Teachers(config.distil, read, classes, world.device) if config.distil.teachers else None
    slices = None
    if config.slices.patterns:
        slices = SlicedExamples(config.slices, read, [text for text, _ in test_set])
    model.to(world.device)
    of = (config.tune.init, config.train.seed, backward)
    penalty = make_penalty(config.close, model, model.language_model, vocabulary, *of)
    predictions, old_head = None, None
    if config.close.method == "outputs":
        predictions = OldPredictions(model.language_model, config.close.strength)
    elif config.close.method == "lwf":
        old_head = OldHead(model, fitting, config.tune.init, config.close.strength)
        model.to(world.device)

    stream = None
    if config.unlabelled.method != "none":
        options = (vocabulary, config.data.length, backward, config.train.batch_size, config.train.steps)
        stream = UnlabelledTexts(config.unlabelled, model, *options, config.train.seed, world)

    def before_step(step: int) -> float:
        nonlocal weight
        if stream is not None:
            stream.before_step(step)
        if config.tune.method == "sequential":
            weight = auxiliary_weight((step - 1) // (config.tune.stage_steps or len(batches)))
        return 1.0

    def labelled_loss(features: Tensor, labels: Tensor, indices: list[int]) -> Tensor:
        if slices is not None:
            return slices.loss(model, features, labels, indices)
        logits = model.head(features)
        if isinstance(model.labels, LabelSpace):
            return model.labels.loss(logits, labels)
        if teachers is not None:
            return teachers.loss(logits, labels, indices)
        if stream is not None:
            return stream.labelled(logits, labels)
        return F.cross_entropy(logits.float(), labels, label_smoothing=config.classifier.smoothing)

    def loss(indices: list[int], generator: torch.Generator) -> tuple[Tensor, int, int]:
        if tasks is not None and indices[0] >= len(fitting):
            return tasks.loss(indices, weight, world.device)
        units, lengths, labels = fitting.tensors(indices, world.device)
        features, extra = model.pooled(units, lengths, weight, predictions)
        value = extra + labelled_loss(features, labels, indices)
        if old_head is not None:
            value = value + old_head.loss(features, indices)
        if stream is not None:
            value = value + stream.loss(features, generator)
        return value, len(indices), int(lengths.sum())

    def validate() -> dict[str, float]:
        figures = evaluate(model, valid, world.device)
        return {"valid_loss": figures["loss"], "valid_accuracy": figures["accuracy"]}

    def fill() -> None:
        for one in (penalty, teachers, old_head):
            if one is not None:
                one.fill()

    settings = {**model.language_model.config.to_dict(), "classes": len(classes)}
    meta = model_meta("document-classifier", settings, vocabulary, to_dict(config))
    meta |= {"classes": classes, "architecture": architecture(model), "backward": backward}
    identity = {"vocabulary": vocabulary.fingerprint, "task": fingerprint("\t".join(e) for e in train_set + test_set)}
    task = Task(model, batches, loss, validate if held else None, meta, identity, "finetune", before_step=before_step)
    if penalty is not None:
        task.loss = with_penalty(loss, penalty.term, task.noted)
    if stream is not None:
        task.identity["unlabelled"] = stream.fingerprint
    if tasks is not None:
        task.identity["tasks"] = tasks.fingerprint
    if config.names.vectors:
        task.identity["names"] = named.fingerprint
    kept: dict[str, nn.Module | None] = {"penalty": penalty and penalty.term, "teachers": teachers, "stream": stream}
    kept |= {"predictions": predictions, "old_head": old_head}
    task.extras = nn.ModuleDict({name: module for name, module in kept.items() if module is not None}) or None
    task.fill = fill
    task.groups = layer_patterns(model, language.layer_patterns(model.language_model))
    task.stages = make_stages(config.tune, config.train, len(batches))
    staging = Staging(model, task.groups, task.stages, validates=True)
    if penalty is not None:
        idle = [] if weight or config.tune.method == "sequential" else unread(model)
        check_learns(config.close, penalty.term, staging, idle)
    learn = most_trainable(staging)
    return Work(config, task, model, valid, test, named, withheld, len(fitting), learn, tasks, slices)


def about_adapted(work: Work) -> dict[str, Any]:
    """What `load_adapted` needs besides the language model and the weights."""
    settings = work.config.classifier.of_model()
    return {"classes": work.task.meta["classes"], "classifier": settings, "length": work.config.data.length}


def make_classifier(
    config: FinetuneConfig, outputs: int, texts: Sequence[str]
) -> tuple[DocumentClassifier, AnyVocabulary, bool]:
    """(a classifier with so many outputs on the language model in tune.init, or on a new one; its vocabulary; whether
    it reads backward)."""
    settings = config.classifier
    if config.tune.init:
        found = load_language_weights(config.tune.init)
        dropouts = config.lstm.scaled(settings.drop_mult) if found.architecture == "lstm" else config.model
        given = {name: value for name, value in dropouts.to_dict().items() if name.startswith(("drop", "weight_drop"))}
        encoder = language_model(dataclasses.replace(found, model={**found.model, **given}))
        language.forget_above(encoder, config.tune.layers)
        vocabulary, backward = found.vocabulary, found.backward
    else:
        vocabulary, backward = Vocabulary.build(texts, config.data.vocab_size), False
        if settings.model == "lstm":
            lstm = dataclasses.replace(config.lstm.scaled(settings.drop_mult), vocab_size=len(vocabulary))
            encoder = LSTMLanguageModel(lstm)
        else:
            encoder = LanguageModel(dataclasses.replace(config.model, vocab_size=len(vocabulary), smoothing=0.0))
    model = DocumentClassifier(encoder, outputs, **settings.of_model())
    insert_adapters(config.adapter, model)
    insert_slices(config.slices, model)
    return model, vocabulary, backward


def unread(model: DocumentClassifier) -> list[nn.Parameter]:
    """Parameters of the language model that a classifier without an auxiliary loss does not read."""
    encoder = model.language_model
    return list(encoder.decoder.parameters()) if isinstance(encoder, LSTMLanguageModel) else []


def most_trainable(staging: Staging) -> int:
    """Parameters that learn in the stage in which most do."""
    sizes = {group.name: group.size for group in staging.groups}
    return max(sum(sizes[name] for name in stage.rates) for stage in staging.stages)


def architecture(model: DocumentClassifier) -> str:
    return "lstm" if isinstance(model.language_model, LSTMLanguageModel) else "transformer"
