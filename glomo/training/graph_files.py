"""A pre-trained graph on the disk: what a target task needs of a pre-training checkpoint, read as a frozen graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glomo.data import AnyVocabulary, vocabulary_from_dict
from glomo.errors import UserError
from glomo.nn import FrozenGraph, GLoMoConfig
from glomo.training import checkpoint


def graph_meta(model: GLoMoConfig, vocabulary: AnyVocabulary, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's meta.json says so that its graph can be used without the run that made it."""
    return {
        "kind": "graph",
        "model": model.to_dict(),
        "vocabulary": vocabulary.to_dict(),
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "config": config,
    }


def load_graph(path: str | Path) -> FrozenGraph:
    """The graph in a checkpoint folder, or in a run folder (its ``best/`` if there is one, else its ``final/``).

    Raises UserError when the folder is missing, damaged, or holds no graph, and when its vocabulary is not the one that
    the graph was trained with.
    """
    folder = Path(path)
    inside = [folder / name for name in ("best", "final") if (folder / name / checkpoint.META).is_file()]
    if inside and not (folder / checkpoint.META).exists():
        folder = inside[0]
    found = checkpoint.load(folder)
    if found.meta.get("kind") != "graph":
        raise UserError(f"{folder} holds no graph but a checkpoint of the kind {found.meta.get('kind')!r}")
    try:
        vocabulary = vocabulary_from_dict(found.meta["vocabulary"])
        trained_with, size = found.meta["vocabulary_fingerprint"], found.meta["model"]["vocab_size"]
        if vocabulary.fingerprint != trained_with:
            raise UserError(
                f"the vocabulary is {vocabulary.fingerprint[:12]} of {len(vocabulary)} units, but the graph was "
                f"trained with {trained_with[:12]} of {size} units"
            )
        return FrozenGraph.restore(found.meta["model"], vocabulary, found.weights)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / checkpoint.META} is damaged and describes no graph ({type(error).__name__}: {error}); use "
            "another checkpoint, or pre-train again"
        ) from None
