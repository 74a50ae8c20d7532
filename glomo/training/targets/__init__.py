"""The tasks of `glomo transfer`: labelled texts, labelled pairs of texts, spans of paragraphs, labelled images."""

from __future__ import annotations

from pathlib import Path

from glomo.data import AnyVocabulary, Vocabulary
from glomo.errors import UserError
from glomo.training.targets.images import ImageTarget, images_of, pixels_for
from glomo.training.targets.pairs import PairTarget, labelled_pairs
from glomo.training.targets.spans import SpanTarget, spans
from glomo.training.targets.target import Target
from glomo.training.targets.texts import TextTarget
from glomo.training.texts import RECALL, labelled
from glomo.training.transfer_config import TransferConfig, TransferData


def kind_of(data: TransferData) -> str:
    """What the task of a [data] section is: "labelled", "labelled pairs", "spans" or "images", as in the catalogue."""
    if data.train or data.test:
        if Path(data.train).suffix.lower() == ".json":
            return "spans"
        return "labelled pairs" if data.pair_column else "labelled"
    if not data.dataset:
        raise UserError(
            "the recipe names no task: give --data.train FILE and --data.test FILE, or --data.dataset NAME "
            "(see `glomo data ls`)"
        )
    if data.dataset == RECALL:
        return "labelled"
    from glomo.data.catalogue import find

    return find(data.dataset, "labelled", "labelled pairs", "spans", "images").kind


def make_target(config: TransferConfig, vocabulary: AnyVocabulary) -> Target:
    """The task of a recipe, in units of a vocabulary."""
    kinds: dict[str, type[TextTarget] | type[PairTarget] | type[SpanTarget] | type[ImageTarget]]
    kinds = {"labelled": TextTarget, "labelled pairs": PairTarget, "spans": SpanTarget, "images": ImageTarget}
    return kinds[kind_of(config.data)](config, vocabulary)


def own_vocabulary(config: TransferConfig) -> AnyVocabulary:
    """The units of a task's training split, where no graph brings a vocabulary."""
    data = config.data
    if kind_of(data) == "images":
        images, _ = images_of(data.dataset, "train")
        return pixels_for(data.dataset, images, config.graph.levels, config.graph.side)
    return Vocabulary.build(_texts_of(data), 20_000)


def _texts_of(data: TransferData) -> list[str]:
    kind = kind_of(data)
    if kind == "labelled":
        return [text for text, _ in labelled(data)[0]]
    if kind == "labelled pairs":
        return [text for first, second, _ in labelled_pairs(data)[0] for text in (first, second)]
    return [text for example in spans(data)[0] for text in (example.paragraph, example.question)]
