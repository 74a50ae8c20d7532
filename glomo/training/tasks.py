"""The [tasks] section of a recipe: other labelled tasks that learn along, on one language model (a shared bottom)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.data import AnyVocabulary, BucketBatches, Subwords, Vocabulary, label_names, read_labelled
from glomo.data.subwords import BEGINS
from glomo.errors import UserError
from glomo.nn.embedded import PAD
from glomo.training.config import check_range
from glomo.training.document_classifier import DocumentClassifier, reader
from glomo.training.documents import Documents, FinetuneData, evaluate
from glomo.training.models import END
from glomo.training.old_predictions import OldPredictions
from glomo.training.texts import Labelled, LabelledData, fingerprint, labelled, task_name
from glomo.training.train_config import TrainConfig
from glomo.training.tune import Tune
from glomo.transfer.signal import TaskSampler, annealed_alpha, weighted_loss
from glomo.transfer.signal.multitask import modules_by_task
from glomo.transfer.structure.insertion import adapters
from glomo.transfer.vocabulary import converted_rows

OWN = ""
"""How the task of [data] is called among the others: as none of them can be."""


@dataclass(frozen=True)
class Tasks:
    """The [tasks] section. Raises UserError for values out of range."""

    datasets: tuple[str, ...] = ()
    """names from the catalogue (`glomo data ls`), with commas between: tasks that learn along on the same language
    model, each with a head of its own; every step is of one task, and train.steps counts those of all"""
    train: tuple[str, ...] = ()
    """your own files of other tasks (.csv .tsv .jsonl), with commas between, with the columns of data.text_column and
    data.label_column; a task is called as its file without the ending"""
    alpha: float = 1.0
    """a task's share of the steps is proportional to its labelled examples to the power of this: 0.5 the square root, 0
    equal shares"""
    anneal: bool = False
    """that power falls from 1 to 0.2 from epoch to epoch of all tasks, and tasks.alpha is not read"""
    weight: float = 1.0
    """of the other tasks' losses; that of [data] has 1"""
    vocabulary: Literal["shared", "words", "subwords"] = "shared"
    """shared: all tasks read the units of that of [data]; words, subwords: each of the others reads units of its own
    texts, at most data.vocab_size, through an embedding of its own (another language, another tokenizer), and what is
    above is shared"""

    def __post_init__(self) -> None:
        for name in ("alpha", "weight"):
            check_range(f"tasks.{name}", getattr(self, name), 0)

    def __bool__(self) -> bool:
        return bool(self.datasets or self.train)


@dataclass(frozen=True)
class OtherTask:
    """A task beside that of [data]."""

    name: str
    classes: list[str]
    train: Labelled
    test: Labelled
    """none of files of one's own"""
    vocabulary: AnyVocabulary | None
    """of its own"""


def read_tasks(settings: Tasks, data: FinetuneData, tune: Tune, layers: str) -> list[OtherTask]:
    """The tasks that [tasks] names.

    Raises UserError for two of one name, for a task without examples or with one class only, and where the tasks would
    share nothing that learns.
    """
    names = [task_name(asdict(data)), *settings.datasets, *(Path(path).stem for path in settings.train)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"two tasks are called {twice!r}; of [data], tasks.datasets and tasks.train (files without their endings) "
            "each needs a name of its own"
        )
    if len(names) > 1 and tune.method in ("top", "features") and tune.top == 1 and layers == "last":
        raise UserError(
            f"tune.method is {tune.method!r} with tune.top = 1: only heads learn, and the other tasks "
            f"({', '.join(names[1:])}) would teach that of [data] nothing; "
            "a larger tune.top, or another method, is needed"
        )
    columns, found = (data.text_column, data.label_column), []
    for name, path in [
        *((name, "") for name in settings.datasets),
        *((Path(path).stem, path) for path in settings.train),
    ]:
        try:
            train, test = (read_labelled(path, *columns), []) if path else labelled(LabelledData(dataset=name))
            vocabulary = _vocabulary(settings, [text for text, _ in train], data)
            found.append(OtherTask(name, label_names(train), train, test, vocabulary))
        except UserError as error:
            raise UserError(f"task {name!r} of [tasks]: {error}") from None
    return found


def _vocabulary(settings: Tasks, texts: Sequence[str], data: FinetuneData) -> AnyVocabulary | None:
    if settings.vocabulary == "shared":
        return None
    if settings.vocabulary == "words":
        return Vocabulary.build(texts, data.vocab_size, data.min_count)
    return Subwords.train(texts, data.vocab_size)


def about_tasks(found: Sequence[OtherTask], hidden: int) -> dict[str, dict[str, Any]]:
    """{task: what `load_classifier` makes its classifier from}."""
    head = {"hidden": hidden, "slices": {}}
    return {
        task.name: {
            "part": f"others.{task.name}",
            "classes": task.classes,
            "vocabulary": task.vocabulary.to_dict() if task.vocabulary else None,
            "head": head,
        }
        for task in found
    }


class TaskBatches:
    """Batches of one task each: a function of (seed, step). The tasks' documents are numbered one behind the other.

    Args:
        lengths: {task: units of each of its documents}.
        batch_size, seed: of each task's `BucketBatches`.
        settings: which shares of the steps the tasks have. An epoch has the steps of the tasks' own epochs together.
        steps: of the training, over which the shares are annealed.
    """

    def __init__(
        self, lengths: Mapping[str, Sequence[int]], batch_size: int, seed: int, settings: Tasks, steps: int
    ) -> None:
        self.parts = {task: BucketBatches(of, batch_size, seed) for task, of in lengths.items()}
        sizes = {task: len(of) for task, of in lengths.items()}
        self.firsts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
        annealed = functools.partial(annealed_alpha, epochs=math.ceil(steps / len(self)))
        self.order = TaskSampler(sizes, len(self), seed, annealed if settings.anneal else settings.alpha)

    def __len__(self) -> int:
        """Batches in an epoch of all tasks."""
        return sum(len(part) for part in self.parts.values())

    def batch(self, step: int) -> list[int]:
        """The documents of a step counted from 0, for all processes together."""
        task = self.order.task(step)
        return [self.firsts[task] + index for index in self.parts[task].batch(self.order.occurrence(step))]

    def place(self, document: int) -> tuple[str, int]:
        """(its task, the number of the task's first document)."""
        return max((one for one in self.firsts.items() if one[1] <= document), key=lambda one: one[1])


class OtherTasks:
    """Other tasks beside a classifier's own: their heads in ``model.others``, embeddings of their own in
    ``model.embeddings``, their documents, and the batches of all.

    Args:
        settings, found: the section, and what `read_tasks` has read.
        model: the classifier.
        vocabulary: its units.
        pretrained: whether they mean something already: then those that a task has too start from their vectors, and
            its other units from the mean one.
        own: the classifier's own documents, which are numbered first.
        encoded: a task's examples as documents, by a vocabulary and its classes.
        head: a new head, from its width and the number of classes.
        smoothing: of the labels.
        train: batch size, seed and steps.

    Raises:
        UserError: a name that no part of a model can have.
    """

    def __init__(
        self,
        settings: Tasks,
        found: Sequence[OtherTask],
        model: DocumentClassifier,
        vocabulary: AnyVocabulary,
        pretrained: bool,
        own: Documents,
        encoded: Callable[[Labelled, AnyVocabulary, list[str]], Documents],
        head: Callable[[int, int], nn.Module],
        smoothing: float,
        train: TrainConfig,
    ) -> None:
        width = 3 * model.language_model.config.dim
        try:
            model.others = modules_by_task({task.name: head(width, len(task.classes)) for task in found})
        except ValueError as error:
            raise UserError(f"tasks.train: {error}") from None
        if settings.vocabulary != "shared":
            table = reader(model.language_model).embedding
            if adapters(table):
                raise UserError(
                    "adapter.where names the embedding, and with tasks.vocabulary = "
                    f"{settings.vocabulary!r} the other tasks have embeddings of their own; give one of them"
                )
            units = vocabulary if pretrained else None
            model.embeddings = nn.ModuleDict(
                {t.name: _embedding(t.vocabulary or vocabulary, table, units) for t in found}
            )
        self.model, self.settings, self.smoothing = model, settings, smoothing
        self.train = {t.name: encoded(t.train, t.vocabulary or vocabulary, t.classes) for t in found}
        self.test = {t.name: encoded(t.test, t.vocabulary or vocabulary, t.classes) for t in found if t.test}
        lengths = {name: [len(ids) for ids in of.ids] for name, of in {OWN: own, **self.train}.items()}
        self.batches = TaskBatches(lengths, train.batch_size, train.seed, settings, train.steps)
        self.fingerprint = fingerprint("\t".join(example) for task in found for example in task.train + task.test)

    def loss(
        self, documents: list[int], auxiliary: float, predictions: OldPredictions | None, device: torch.device
    ) -> tuple[Tensor, int, int]:
        """That of a step on another task: as the classifier's own, on the task's head, weighted."""
        assert self.model.others is not None
        name, first = self.batches.place(documents[0])
        units, lengths, labels = self.train[name].tensors([document - first for document in documents], device)
        with reads(self.model, name):
            features, extra = self.model.pooled(units, lengths, auxiliary, predictions)
        if predictions is not None:
            predictions.noted["penalty"] *= self.settings.weight
        logits = self.model.others[name](features)
        value = extra + F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        weights = dict.fromkeys(self.train, self.settings.weight)
        return weighted_loss({name: value}, weights), len(documents), int(lengths.sum())

    def figures(self, device: torch.device) -> dict[str, dict[str, float]]:
        """{task: {test_accuracy, test_loss}} of the tasks that have a test."""
        found = {}
        for name, test in self.test.items():
            figures = evaluate(TaskClassifier(self.model, name), test, device)
            found[name] = {f"test_{figure}": value for figure, value in figures.items()}
        return found


class TaskClassifier(nn.Module):
    """A classifier with the head of another of its tasks: units (B, T), lengths (B,) -> logits (B, classes)."""

    def __init__(self, model: DocumentClassifier, task: str) -> None:
        super().__init__()
        assert model.others is not None
        self.model, self.head, self.task = model, model.others[task], task

    def forward(self, units: Tensor, lengths: Tensor) -> Tensor:
        with reads(self.model, self.task):
            return self.head(self.model.pooled(units, lengths)[0])


@contextmanager
def reads(model: DocumentClassifier, task: str) -> Iterator[None]:
    """Within it the language model reads the units of another task, through its embedding if it has one."""
    if model.embeddings is None:
        yield
        return
    part, other = reader(model.language_model), model.embeddings[task]
    assert isinstance(other, nn.Embedding)
    own, part.embedding = part.embedding, other
    try:
        yield
    finally:
        part.embedding = own


def _embedding(vocabulary: AnyVocabulary, model: nn.Embedding, units: AnyVocabulary | None) -> nn.Embedding:
    """One for another vocabulary, from a language model's and the units of its rows; None: drawn as wide as it."""
    table = nn.Embedding(len(vocabulary) + 1, model.embedding_dim, padding_idx=PAD)
    if units is None:
        nn.init.normal_(table.weight[PAD + 1 :].data, std=float(model.weight.detach().std()))
    else:
        mixed = type(units) is not type(vocabulary)
        old, new = ([*(_words(v) if mixed else v.units()), END] for v in (units, vocabulary))
        table.weight.data.copy_(converted_rows(model.weight, old, new))
    return table


def _words(vocabulary: AnyVocabulary) -> list[str]:
    """The units, of subwords those that begin a word as that word, and the others as no word is called."""
    units = vocabulary.units()
    if not isinstance(vocabulary, Subwords):
        return units
    return [unit.removeprefix(BEGINS) if unit.startswith(BEGINS) else f"\1{unit}" for unit in units]
