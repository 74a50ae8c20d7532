"""Fine-tuning: labelled documents in, a classifier on a language model's encoder out, in a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glomo.data import AnyVocabulary, BucketBatches, Vocabulary
from glomo.nn.awd_lstm import LSTMLanguageModel
from glomo.nn.transformer import LanguageModel
from glomo.training import checkpoint, language
from glomo.training.adapted import FILE, insert_adapters, save_adapted
from glomo.training.close import check_learns, with_penalty
from glomo.training.config import default_values, to_dict
from glomo.training.distributed import World
from glomo.training.document_classifier import BESIDE, DocumentClassifier, layer_patterns
from glomo.training.documents import Documents, draw, encode, evaluate, figures_of, probabilities
from glomo.training.finetune_config import FinetuneConfig, check_together
from glomo.training.language_model import language_model
from glomo.training.loop import Batches, Task, set_up, train
from glomo.training.memory import PeakMemory
from glomo.training.models import load_language_weights, model_meta
from glomo.training.names import NamedTask
from glomo.training.objective import Objective
from glomo.training.results import most_trainable, write_results
from glomo.training.run_folder import RunFolder
from glomo.training.slices import SlicedExamples, insert_slices
from glomo.training.staging import Staging
from glomo.training.tasks import OtherTasks, about_tasks, read_tasks
from glomo.training.texts import Labelled, fingerprint, labelled
from glomo.training.tune import make_stages


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
    world = set_up(config.train)
    work = prepare(config, world)
    config = work.config
    memory = PeakMemory(world.device)
    if world.rank:
        return train(work.task, config.train, None, world)
    with RunFolder(out, to_dict(config), defaults=default_values(config)) as folder:
        finished = folder.final.exists()
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
        lasting = [p for name, p in work.model.named_parameters() if name.partition(".")[0] not in BESIDE]
        results |= {"examples": work.examples, "parameters": sum(p.numel() for p in lasting)}
        results |= {"trainable": work.trainable, "budget": config.train.steps}
        if work.tasks is not None:
            results |= {"tasks": work.tasks.figures(world.device)}
        if work.slices is not None:
            results |= {"slices": work.slices.figures(said, work.test.labels)}
        if config.adapter and config.tune.init and not (config.slices.patterns or config.names.given):
            for name in BESIDE:
                setattr(work.model, name, None)
            save_adapted(work.model, folder.path / FILE, about_adapted(work))
        return write_results(folder.path, results, None if finished else memory)


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


def prepare(config: FinetuneConfig, world: World) -> Work:
    """The task of a recipe. Raises UserError as `finetune`."""
    check_together(config)
    config = language.resolved(config)
    named = NamedTask(config.names, *labelled(config.data), config.train.seed)
    train_set, test_set, classes = named.train, named.test, named.seen
    others = read_tasks(config.tasks, config.data, config.tune, config.classifier.layers)
    sharing = [example for other in others if other.vocabulary is None for example in other.train]
    texts = [text for text, _ in train_set + sharing]
    model, vocabulary, backward = make_classifier(config, named.outputs, texts)
    named.insert(model)

    def encoded(examples: Labelled, units: AnyVocabulary, names: list[str]) -> Documents:
        return encode(examples, units, names, config.data.length, backward)

    parts = (train_set, test_set, named.withheld)
    documents, test, withheld = (encoded(part, vocabulary, named.classes) for part in parts)
    chosen, held = draw(documents, classes, config.data, config.train.seed)
    fitting, valid = documents.part(chosen), documents.part(held)
    batches: Batches = BucketBatches([len(ids) for ids in fitting.ids], config.train.batch_size, config.train.seed)
    tasks = None
    if others:
        heads, units = (config.classifier.head, config.classifier.smoothing), (vocabulary, bool(config.tune.init))
        tasks = OtherTasks(config.tasks, others, model, *units, fitting, encoded, *heads, config.train)
        batches = tasks.batches
    texts = [train_set[i][0] for i in chosen]
    slices = None
    if config.slices.patterns:
        slices = SlicedExamples(config.slices, texts, [text for text, _ in test_set])
    objective = Objective(config, model, vocabulary, backward, fitting, texts, classes, slices, tasks, batches, world)

    def validate() -> dict[str, float]:
        figures = evaluate(model, valid, world.device)
        return {"valid_loss": figures["loss"], "valid_accuracy": figures["accuracy"]}

    settings = {**model.language_model.config.to_dict(), "classes": len(classes)}
    meta = model_meta("document-classifier", settings, vocabulary, to_dict(config))
    meta |= {"classes": classes, "architecture": architecture(model), "backward": backward}
    old_head = objective.old_head
    along = {**about_tasks(others, config.classifier.hidden), **(old_head.about if old_head else {})}
    meta |= {"others": along} if along else {}
    identity = {"vocabulary": vocabulary.fingerprint, "task": fingerprint("\t".join(e) for e in train_set + test_set)}
    identity |= objective.identity
    if config.names.given:
        identity["names"] = named.fingerprint
    task = Task(model, batches, objective.loss, validate if held else None, meta, identity, "finetune")
    task.before_step, task.fill = objective.before_step, objective.fill
    task.noted = objective.noted
    task.extras = objective if any(objective.children()) else None
    task.groups = layer_patterns(model, language.layer_patterns(model.language_model))
    task.stages = make_stages(config.tune, config.train, len(batches))
    staging = Staging(model, task.groups, task.stages, validates=True)
    if objective.penalty is not None:
        task.loss = with_penalty(objective.loss, objective.penalty, task.noted)
    if objective.held:
        check_learns(config.close, objective.held, staging, objective.unread)
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
        vocabulary, backward = Vocabulary.build(texts, config.data.vocab_size, config.data.min_count), False
        if settings.model == "lstm":
            lstm = dataclasses.replace(config.lstm.scaled(settings.drop_mult), vocab_size=len(vocabulary))
            encoder = LSTMLanguageModel(lstm)
        else:
            encoder = LanguageModel(dataclasses.replace(config.model, vocab_size=len(vocabulary), smoothing=0.0))
    model = DocumentClassifier(encoder, outputs, **settings.of_model())
    insert_adapters(config.adapter, model)
    insert_slices(config.slices, model)
    return model, vocabulary, backward


def architecture(model: DocumentClassifier) -> str:
    return "lstm" if isinstance(model.language_model, LSTMLanguageModel) else "transformer"
