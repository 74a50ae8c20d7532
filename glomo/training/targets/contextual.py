"""Vectors of words in their context, by a pre-trained encoder of Hugging Face's transformers that stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glomo.errors import UserError
from glomo.training.transfer_config import Features

PIECES = 8192  # of texts, padding included, that are encoded at a time

Text = tuple[str, ...]


@dataclass(frozen=True)
class ContextTable:
    """The texts that a model reads: a row for each word of each of them; rows 0 (padding) and 1 are zero."""

    places: Mapping[Text, range]
    vectors: Tensor
    """(rows, dim) fp16"""
    counts: Mapping[str, int]

    def encode(self, words: Iterable[str]) -> list[int]:
        return list(self.places[tuple(words)])

    def features(self, settings: Features) -> ContextFeatures:
        return ContextFeatures(self.vectors)


class ContextFeatures(nn.Module):
    """Rows of a table `(B, T)` to features `(B, T, dim)`. They follow from the texts: they are not saved."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.dim = vectors.shape[1]
        self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.get_buffer("vectors")[rows].float()


class Encoder:
    """A model of transformers and its tokenizer, from a folder; nothing is downloaded, unpickled or run from there.

    Raises UserError where transformers, or something in the folder, is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise UserError('features.kind contextual needs transformers: pip install "transformers>=5"') from None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, add_prefix_space=True)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no encoder with its tokenizer: {str(error).splitlines()[0]}") from None
        config = self.model.config
        if config.is_encoder_decoder or not self.tokenizer.is_fast:
            raise UserError(f"{folder} holds a {config.model_type}; an encoder with a fast tokenizer is needed")
        self.model.requires_grad_(False).eval()
        self.most = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512))
        self._kept: dict[Text, Tensor] = {}
        self._cut: dict[Text, int] = {}  # words without a piece

    def vectors(self, texts: Iterable[Text], device: torch.device) -> tuple[dict[Text, Tensor], int]:
        """({text: `(words, dim)` fp16}, how many words stand behind the pieces that the model can read).

        A word's vector is the mean of its pieces' last hidden states; zero where it has none. What was asked for
        before is remembered: graphs and seeds that are compared share their texts.
        """
        wanted = list(dict.fromkeys(texts))
        new = sorted((text for text in wanted if text not in self._kept), key=len)
        if new:
            self.model.to(device)
        while new:
            size = max(1, PIECES // (2 * len(new[-1]) + 2))  # a word has less than two pieces as a rule
            part, new = new[-size:], new[:-size]
            self._kept.update(zip(part, self._encode(part, device), strict=True))
        return {text: self._kept[text] for text in wanted}, sum(self._cut.get(text, 0) for text in wanted)

    @torch.no_grad()
    def _encode(self, texts: Sequence[Text], device: torch.device) -> list[Tensor]:
        pieces = self.tokenizer(
            [[word.strip() for word in text] for text in texts],
            is_split_into_words=True,
            truncation=True,
            max_length=self.most,
            padding=True,
            return_tensors="pt",
        )
        states = self.model(**pieces.to(device)).last_hidden_state.float().cpu()
        found = []
        for i, text in enumerate(texts):
            of = [(piece, word) for piece, word in enumerate(pieces.word_ids(i)) if word is not None]
            places, words = torch.tensor(of, dtype=torch.int64).view(-1, 2).unbind(1)
            count = torch.zeros(len(text)).index_add_(0, words, torch.ones(len(words)))
            total = torch.zeros(len(text), states.shape[2]).index_add_(0, words, states[i, places])
            found.append((total / count.clamp(min=1)[:, None]).half())
            if pieces.encodings[i].overflowing:
                self._cut[text] = len(text) - 1 - int(words.max())
        return found


_encoders: dict[Path, Encoder] = {}


def context_table(
    settings: Features, train: Iterable[Sequence[str]], test: Iterable[Sequence[str]], device: torch.device
) -> ContextTable:
    """The table of a task's texts, in the context that each alone is."""
    from glomo.data.catalogue import DATASETS, encoder_folder

    folder = encoder_folder(settings.encoder) if settings.encoder in DATASETS else Path(settings.encoder).resolve()
    if folder not in _encoders:
        _encoders[folder] = Encoder(folder)
    texts = [tuple(text) for part in (train, test) for text in part]
    found, cut = _encoders[folder].vectors(texts, device)
    places, start = {}, 2
    for text, vectors in found.items():
        places[text] = range(start, start + len(vectors))
        start += len(vectors)
    counts: dict[str, Any] = {"words behind what the encoder can read": cut} if cut else {}
    dim = _encoders[folder].model.config.hidden_size
    return ContextTable(places, torch.cat([torch.zeros(2, dim, dtype=torch.float16), *found.values()]), counts)
