"""Trained models on the disk: what others need of a run's checkpoint, and how it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glomo.data import AnyVocabulary, vocabulary_from_dict
from glomo.errors import UserError
from glomo.nn import FrozenGraph, GLoMoConfig
from glomo.training import checkpoint


def model_meta(kind: str, model: dict[str, Any], vocabulary: AnyVocabulary, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's meta.json says so that its model can be used without the run that made it."""
    return {
        "kind": kind,
        "model": model,
        "vocabulary": vocabulary.to_dict(),
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "config": config,
    }


def graph_meta(model: GLoMoConfig, vocabulary: AnyVocabulary, config: dict[str, Any]) -> dict[str, Any]:
    """`model_meta` of a graph."""
    return model_meta("graph", model.to_dict(), vocabulary, config)


@contextlib.contextmanager
def model_in(
    path: str | Path, kind: str, what: str, order: Sequence[str] = ("final", "best")
) -> Iterator[tuple[checkpoint.Checkpoint, AnyVocabulary]]:
    """(checkpoint, vocabulary) of a checkpoint folder, or of the first one of ``order`` in a run folder.

    Raises UserError when the folder is missing, damaged, or holds a model of another kind than ``what``, when the
    vocabulary is not the one that the model was trained with, and when the block that makes the model of it cannot.
    """
    folder = Path(path)
    inside = [folder / name for name in order if (folder / name / checkpoint.META).is_file()]
    if inside and not (folder / checkpoint.META).exists():
        folder = inside[0]
    found = checkpoint.load(folder)
    if found.meta.get("kind") != kind:
        raise UserError(f"{folder} holds no {what} but a checkpoint of the kind {found.meta.get('kind')!r}")
    try:
        vocabulary = vocabulary_from_dict(found.meta["vocabulary"])
        trained_with, size = found.meta["vocabulary_fingerprint"], found.meta["model"]["vocab_size"]
        if vocabulary.fingerprint != trained_with:
            raise UserError(
                f"the vocabulary is {vocabulary.fingerprint[:12]} of {len(vocabulary)} units, but the {what} was "
                f"trained with {trained_with[:12]} of {size} units"
            )
        yield found, vocabulary
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "loading state_dict" not in str(error):
            raise
        where, reason = folder / checkpoint.META, f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(
            f"{where} is damaged and describes no {what} ({reason}); use another checkpoint, or train again"
        ) from None


def load_graph(path: str | Path) -> FrozenGraph:
    """The graph in a checkpoint folder, or in a run folder (its ``best/`` if there is one, else its ``final/``).

    Raises UserError when the folder is missing, damaged, or holds no graph, and when its vocabulary is not the one that
    the graph was trained with.
    """
    with model_in(path, "graph", "graph", ("best", "final")) as (found, vocabulary):
        return FrozenGraph.restore(found.meta["model"], vocabulary, found.weights)
