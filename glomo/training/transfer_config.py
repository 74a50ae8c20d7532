"""The recipe of `glomo transfer`: its sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from glomo.errors import UserError
from glomo.training.config import check_range, nearest
from glomo.training.texts import LabelledData
from glomo.training.train_config import TrainConfig
from glomo.training.tune import Tune

GRAPHS = ("none", "uniform", "band", "match", "random", "learned")


@dataclass(frozen=True)
class TransferData(LabelledData):
    """The [data] section: the labelled task.

    What the task is follows from the data: labelled texts, labelled pairs of texts (a data set of them, or a file with
    data.pair_column), questions whose answer is a span of a paragraph (squad, or .json files of its form), or images
    (a data set of them).
    """

    pair_column: str = ""
    """of your own files of labelled pairs: the second text's column"""
    length: int = 100
    """units after which a text is cut; of a test paragraph none"""
    judge: Literal["test", "valid"] = "test"
    """examples that graphs are compared by: the test's, or a tenth of the training examples, which are then not
    trained on (whole articles of squad; all pairs with the same first text)"""
    judged: int = 0
    """of the examples to compare by, so many, the same in every run; 0: all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("data.length", self.length, 1)
        check_range("data.judged", self.judged, 0)
        if self.judge == "valid" and self.test_dataset:
            raise UserError("data.judge is valid: data.test_dataset would not be read")


@dataclass(frozen=True)
class Features:
    """The [features] section: what the graph is applied to."""

    kind: Literal["learned", "random", "glove-50d", "contextual"] = "learned"
    """learned embeddings, random ones that stay, GloVe vectors that stay, or what a pre-trained encoder makes of each
    word in its text, which stays too"""
    dim: int = 64
    """width of learned and random embeddings"""
    chars: int = 0
    """filters of a CNN over the characters of a word, whose greatest values stand beside its vector; 0: none"""
    states: bool = False
    """apply the graph to the states of a recurrent network over the embeddings, of the same width"""
    encoder: str = "minilm-l6"
    """of contextual features: an encoder of the catalogue, or the folder of one with its tokenizer, as saved by
    save_pretrained of Hugging Face's transformers. It reads the words as the graph's vocabulary has them, which may be
    without capitals"""

    def __post_init__(self) -> None:
        check_range("features.dim", self.dim, 2 if self.states else 1)  # half of the states for each direction
        if self.kind == "contextual" and self.chars:
            raise UserError("features.kind contextual knows no characters of words; it needs --features.chars 0")
        check_range("features.chars", self.chars, 0)


@dataclass(frozen=True)
class GraphOptions:
    """The [graph] section: the learned graph, and how graphs are mixed; see `glomo.nn.GraphTransfer`."""

    path: str = ""
    """run or checkpoint folder of `glomo pretrain`, for the graphs learned and random"""
    cut: float = 0.0
    """of the graphs learned and random (not of softmax): their scores are lowered by it, so weak links fall away"""
    rate: float = 0.0
    """of the graphs learned and random: their own weights learn too, at train.lr times this (checkpoints have them, as
    graph.*); 0: they stay"""
    mixtures: int = 2
    """mixed graphs per direction"""
    weights: Literal["global", "target"] = "global"
    """one mixture for all units, or one that depends on the target"""
    chains: bool = True
    """mix the running products of the layers' graphs too"""
    layers: Literal["all", "last"] = "all"
    """all, or the last layer alone (an ablation)"""
    fusion: Literal["gate", "concat", "none"] = "gate"
    """of the features with what the graphs bring"""
    band: int = 3
    """width of the graph band"""
    levels: int = 16
    """of images without a learned graph: levels of a channel; a learned graph brings its own"""
    side: int = 0
    """of images without a learned graph: their height and width; 0: as they are"""
    joined: bool = True
    """of tasks of two texts: graphs of both as one row, so that units of one may read the other; false: of each"""

    def __post_init__(self) -> None:
        check_range("graph.cut", self.cut, 0)
        check_range("graph.rate", self.rate, 0)
        check_range("graph.mixtures", self.mixtures, 1)
        check_range("graph.band", self.band, 1)
        check_range("graph.levels", self.levels, 1, 256)
        check_range("graph.side", self.side, 0)


@dataclass(frozen=True)
class Head:
    """The [head] section."""

    kind: Literal["pooling", "bigru", "conv"] = "pooling"
    """pooling or bigru, of images conv too; spans have a reader of their own"""
    hidden: int = 64
    """width"""
    dropout: float = 0.2
    """of embeddings, and of the pooled vector"""

    def __post_init__(self) -> None:
        check_range("head.hidden", self.hidden, 2 if self.kind == "bigru" else 1)  # half of it for each direction
        check_range("head.dropout", self.dropout, 0, 1)


@dataclass(frozen=True)
class Compare:
    """The [compare] section: which graphs, how often."""

    graphs: tuple[str, ...] = ("none", "uniform", "band", "random", "learned")
    """of none, uniform, band, match (units that are equal), random, learned, with commas between"""
    seeds: int = 3
    """runs of each graph, with the seeds train.seed, train.seed + 1, ..."""

    def __post_init__(self) -> None:
        check_range("compare.seeds", self.seeds, 1)
        if not self.graphs:
            raise UserError(f"compare.graphs is empty; at least one of {', '.join(GRAPHS)} is needed")
        for name in self.graphs:
            if name not in GRAPHS:
                raise UserError(f"compare.graphs names {name!r}{nearest(name, GRAPHS)}")


@dataclass(frozen=True)
class TransferConfig:
    """A transfer recipe."""

    data: TransferData = field(default_factory=TransferData)
    features: Features = field(default_factory=Features)
    graph: GraphOptions = field(default_factory=GraphOptions)
    head: Head = field(default_factory=Head)
    compare: Compare = field(default_factory=Compare)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=500, eval_every=0, checkpoint_every=0, keep=1))
    tune: Tune = field(default_factory=Tune)
