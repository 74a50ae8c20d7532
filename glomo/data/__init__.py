"""Text and other data: users' own files, vocabularies, batches, a catalogue of open data sets, and a synthetic task."""

from __future__ import annotations

from typing import Any

from glomo.data.batching import BucketBatches, TokenBatches, Windows, pad
from glomo.data.files import encode_labels, label_names, read_labelled, read_pairs, read_texts
from glomo.data.pixels import Pixels
from glomo.data.subwords import Subwords
from glomo.data.vocabulary import AnyVocabulary, Vocabulary, check_same_vocabulary
from glomo.errors import UserError

__all__ = [
    "AnyVocabulary",
    "BucketBatches",
    "Pixels",
    "Subwords",
    "TokenBatches",
    "Vocabulary",
    "Windows",
    "check_same_vocabulary",
    "encode_labels",
    "label_names",
    "pad",
    "read_labelled",
    "read_pairs",
    "read_texts",
    "vocabulary_from_dict",
]


def vocabulary_from_dict(saved: dict[str, Any]) -> AnyVocabulary:
    """Restore a :class:`Vocabulary`, :class:`Subwords` or :class:`Pixels` from its ``to_dict()``.

    Raises:
        UserError: the saved form is of none of these kinds, or damaged.
    """
    kind = saved.get("kind") if isinstance(saved, dict) else None
    if kind == "words":
        return Vocabulary.from_dict(saved)
    if kind == "subwords":
        return Subwords.from_dict(saved)
    if kind == "pixels":
        return Pixels.from_dict(saved)
    raise UserError(f"a saved vocabulary is of the kind {kind!r}; 'words', 'subwords' or 'pixels' is needed")
