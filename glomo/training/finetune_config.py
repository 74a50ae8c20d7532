"""The recipe of `glomo finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig
from glomo.nn.pooling import PoolingHead
from glomo.nn.transformer_config import TransformerConfig
from glomo.training.adapted import Adapters
from glomo.training.close import Close, check_whole
from glomo.training.config import check_range
from glomo.training.distil import Distil
from glomo.training.documents import FinetuneData
from glomo.training.names import Names, check_alone
from glomo.training.slices import Slices
from glomo.training.tasks import Tasks
from glomo.training.train_config import TrainConfig
from glomo.training.tune import Tune
from glomo.training.unlabelled import Unlabelled


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


def check_together(config: FinetuneConfig) -> None:
    """Raises UserError for sections that do not go together."""
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
    check_whole(config.close, config.tune)
    if config.unlabelled.method == "mean-teacher" and config.tune.method == "chain-thaw":
        raise UserError(
            "tune.method = 'chain-thaw' goes back to the best weights of each stage, which the mean of "
            "unlabelled.method = 'mean-teacher' would not follow; give one of them"
        )
    if config.tasks and config.close.method == "lwf":
        raise UserError("close.method is 'lwf', of which nothing is recorded on the texts of tasks; give one of them")
    if config.tasks and config.tasks.vocabulary != "shared":
        asked = {
            "classifier.auxiliary": config.classifier.auxiliary > 0,
            "tune.method = 'sequential'": config.tune.method == "sequential",
            "close.method = 'outputs'": config.close.method == "outputs",
        }
        if config.tune.method == "chain-thaw":
            raise UserError(
                "tune.method is 'chain-thaw', in whose stages one layer learns at a time, and with tasks.vocabulary = "
                f"{config.tasks.vocabulary!r} the embedding is none of the other tasks'; give one of them"
            )
        for name in (name for name, given in asked.items() if given):
            raise UserError(
                f"{name} asks for the language model's own predictions, which it has not of units of others "
                f"(tasks.vocabulary = {config.tasks.vocabulary!r}); give one of them"
            )
    config.slices.check(config.distil.teachers, config.unlabelled.tsa, config.classifier.smoothing)
    if config.names.given:
        others = (bool(config.distil.teachers), config.unlabelled.method != "none", bool(config.slices.patterns))
        check_alone(config.names, *others, config.classifier.smoothing)
