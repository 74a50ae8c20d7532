"""Subword vocabulary: byte-level BPE by the ``tokenizers`` library, with the interface of the word vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from glomo.data.vocabulary import PAD, UNK, vocabulary_fingerprint
from glomo.errors import UserError

SMALLEST = 258  # padding, unknown and the 256 bytes
BEGINS = "Ġ"  # stands for the space before a word, in the pieces that begin one


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "subword vocabularies need the package 'tokenizers', which is not installed; pip install tokenizers"
        ) from None
    return tokenizers


class Subwords:
    """Pieces of words and their ids: 0 is padding, 1 unknown (which bytes leave nothing to), then bytes and merges.

    Made by :meth:`train` or :meth:`from_dict`. Text is brought to Unicode NFC, then cut by byte-level BPE (Sennrich
    et al. 2016, over bytes as in GPT-2), so that every text can be encoded.
    """

    pad_id = 0
    unk_id = 1

    def __init__(self, tokenizer_json: str):
        try:
            self._tokenizer = _library().Tokenizer.from_str(tokenizer_json)
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"a saved subword vocabulary cannot be read ({error}); it is damaged or not from this program"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "<pad>" written in a text is text
        ids = (self._tokenizer.token_to_id(PAD), self._tokenizer.token_to_id(UNK))
        if ids != (0, 1):
            raise UserError(f"a saved subword vocabulary has the ids {ids} for {PAD} and {UNK}; (0, 1) is needed")
        # Parsed, so that the canonical form does not depend on how the library lays its JSON out.
        self._saved: dict[str, Any] = {"kind": "subwords", "tokenizer": json.loads(tokenizer_json)}
        self.fingerprint: str = vocabulary_fingerprint(self._saved)

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> Subwords:
        """Learn the merges from texts. The same texts give the same vocabulary.

        Args:
            size: the most entries, the two reserved ones and the 256 bytes included.

        Raises:
            UserError: ``size`` is smaller than 258.
        """
        if size < SMALLEST:
            raise UserError(
                f"a subword vocabulary of {size} entries is too small; {SMALLEST} are needed for padding, unknown "
                "and the 256 bytes"
            )
        lib = _library()
        tokenizer = lib.Tokenizer(lib.models.BPE())
        tokenizer.normalizer = lib.normalizers.NFC()
        tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.post_processor = lib.processors.ByteLevel(trim_offsets=True)
        tokenizer.decoder = lib.decoders.ByteLevel()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[PAD, UNK],
            initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """The ids of the pieces of the text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the pieces; bytes that form no character become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def tokens(self, text: str) -> list[str]:
        """The pieces as a person reads them, one per id of :meth:`encode`; pieces of one character all show it."""
        text = self._tokenizer.normalizer.normalize_str(text)
        return [text[start:end] or " " for start, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]

    def units(self) -> list[str]:
        """The pieces by id, each byte as the character that stands for it."""
        ids: dict[str, int] = self._tokenizer.get_vocab()
        return sorted(ids, key=lambda piece: ids[piece])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON-able values; :meth:`from_dict` restores it."""
        return self._saved

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Subwords:
        """Restore from :meth:`to_dict`; a damaged form raises a UserError."""
        if not isinstance(saved.get("tokenizer"), dict):
            raise UserError("a saved subword vocabulary has no tokenizer in it; it is damaged or not from this program")
        return cls(json.dumps(saved["tokenizer"]))
