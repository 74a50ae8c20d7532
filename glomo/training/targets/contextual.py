"""Vectors of words in their context, by a pre-trained encoder of Hugging Face's transformers that stays as it is."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glomo.data import pad
from glomo.errors import UserError
from glomo.training.config import nearest
from glomo.training.transfer_config import Features

PIECES = 8192  # of texts, padding included, that are encoded at a time
FILES = ("config.json", "model.safetensors", "tokenizer.json")

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

    Raises UserError where transformers is missing, and for a folder that does not hold what is needed.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise UserError('features.kind contextual needs transformers: pip install "transformers>=5"') from None
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            self.model, found = AutoModel.from_pretrained(
                folder, **local, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # a damaged file can make anything of it
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{folder} cannot be read as an encoder: {said}") from None
        missing = [name for name in found["missing_keys"] if not name.startswith("pooler.")]
        if missing:
            raise UserError(f"{folder}: the weights are not those of config.json, {missing[0]} is missing")
        config = self.model.config
        if config.is_encoder_decoder or not self.tokenizer.is_fast:
            raise UserError(f"{folder}: an encoder with a fast tokenizer is needed, not a {config.model_type}")
        self.device, self.model = device, self.model.requires_grad_(False).eval().to(device)
        self.most = min(self.tokenizer.model_max_length, _positions(self.model))

    def table(self, texts: Iterable[Text]) -> ContextTable:
        """Every text alone. A word's vector is the mean of its pieces' last hidden states, zero where it has none."""
        pieces = {text: self._pieces(text) for text in texts}
        places, start = {}, 2
        for text in pieces:
            places[text] = range(start, start + len(text))
            start += len(text)
        vectors = torch.zeros(start, self.model.config.hidden_size, dtype=torch.float16)
        order = sorted((text for text in pieces if pieces[text].ids), key=lambda text: len(pieces[text].ids))
        while order:
            size = max(1, PIECES // len(pieces[order[-1]].ids))
            part, order = order[-size:], order[:-size]
            for text, states in zip(part, self._states([pieces[text].ids for text in part]), strict=True):
                words = torch.tensor(pieces[text].words)
                total = torch.zeros(len(text) + 1, states.shape[1]).index_add_(0, words, states[: len(words)])
                count = torch.zeros(len(text) + 1).index_add_(0, words, torch.ones(len(words)))
                vectors[list(places[text])] = (total / count.clamp(min=1)[:, None])[:-1].half()
        cut = sum(found.behind for found in pieces.values())
        return ContextTable(places, vectors, {"words behind what the encoder can read": cut} if cut else {})

    def _pieces(self, text: Text) -> _Pieces:
        # as one string: not all tokenizers keep words apart that they are given one by one
        words = [word.strip() for word in text]
        found = self.tokenizer(
            " ".join(words), truncation=True, max_length=self.most, return_offsets_mapping=True, verbose=False
        )
        ids, spans = found["input_ids"], found["offset_mapping"]
        starts = list(itertools.accumulate((len(word) + 1 for word in words[:-1]), initial=0))
        # a word begins with the space before it, which some tokenizers take for a piece or a part of one
        numbers = [bisect.bisect_right(starts, end) - 1 if end > start else len(words) for start, end in spans]
        read = max((end for _, end in spans), default=0)
        cut = len(ids) >= self.most
        behind = sum(1 for word, start in zip(words, starts, strict=True) if cut and word and start >= read)
        return _Pieces(ids, numbers, behind)

    @torch.no_grad()
    def _states(self, texts: Sequence[list[int]]) -> Tensor:
        ids, lengths = pad(texts)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        found = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        return found.last_hidden_state.float().cpu()


class _Pieces(NamedTuple):
    ids: list[int]
    words: list[int]
    """the number of each piece's word; of the model's own marks, how many words there are"""
    behind: int
    """words behind the last piece that can be read"""


def _positions(model: nn.Module) -> int:
    """How many pieces a model can read; some count positions from behind the padding's number."""
    most = getattr(model.config, "max_position_embeddings", 0) or 512
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            most -= int(module.padding_idx) + 1
    return most


def encoder_folder(settings: Features) -> Path:
    """Where the encoder of contextual features is; one of the catalogue is fetched. Raises UserError for none."""
    from glomo.data import catalogue

    known = _known()
    if settings.encoder in known:
        return catalogue.encoder_folder(settings.encoder)
    folder = Path(settings.encoder)
    missing = [file for file in FILES if not (folder / file).is_file()]
    if not settings.encoder or not folder.is_dir():
        raise UserError(
            f"features.encoder is {settings.encoder!r}, which is no folder{nearest(settings.encoder, list(known))}"
        )
    if missing:
        raise UserError(f"features.encoder is {folder}, and {missing[0]} is not there; save_pretrained writes it")
    return folder


def _known() -> dict[str, str]:
    """The encoders of the catalogue, and what tells their files from others."""
    from glomo.data.catalogue import DATASETS

    return {name: entry.source.sha256 for name, entry in DATASETS.items() if entry.kind == "encoder"}


def encoder_fingerprint(settings: Features) -> str:
    """What tells an encoder from another: of its weights and of its tokenizer. Nothing is fetched."""
    known = _known()
    if settings.encoder in known:
        return known[settings.encoder][:12]
    folder = encoder_folder(settings)
    digest = hashlib.sha256()
    for file in FILES:
        digest.update((folder / file).read_bytes())
    return digest.hexdigest()[:12]


_last: list[tuple[str, ContextTable]] = []


def context_table(
    settings: Features, train: Iterable[Sequence[str]], test: Iterable[Sequence[str]], device: torch.device
) -> ContextTable:
    """The table of a task's texts. The last one is remembered: graphs that are compared share it."""
    texts = dict.fromkeys(tuple(text) for part in (train, test) for text in part)
    fingerprint = encoder_fingerprint(settings)
    if not _last or _last[0][0] != fingerprint or _last[0][1].places.keys() != texts.keys():
        _last.clear()  # before another is made: they are large
        _last.append((fingerprint, Encoder(encoder_folder(settings), device).table(texts)))
    return _last[0][1]
