"""A trained translator: out of its checkpoint, sentences in, sentences out, and its BLEU."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glomo.data import Subwords, pad
from glomo.errors import UserError
from glomo.nn.decoding import beam_search, greedy
from glomo.nn.rnn import RNNConfig, RNNTranslator
from glomo.nn.transformer import Transformer
from glomo.nn.transformer_config import TransformerConfig
from glomo.training.models import model_in
from glomo.training.progress import track
from glomo.training.translation import Method, Pairs

BATCH = 64  # sentences that are searched for together, of similar length


@dataclass
class Translator:
    """A model with its vocabulary and its way of searching."""

    model: Transformer | RNNTranslator
    vocabulary: Subwords
    method: Method
    max_length: int
    """the longest source it takes, in units; a recurrent model takes any"""

    @torch.no_grad()
    def translate(
        self, sentences: Sequence[str], device: torch.device | str = "cpu", progress: bool = False
    ) -> list[str]:
        """One translation a sentence; an empty sentence stays empty. progress: a bar on a terminal.

        Raises UserError for a sentence with more units than the model takes.
        """
        self.model.eval().to(device)
        encoded = [self.vocabulary.encode(sentence) for sentence in sentences]
        for number, units in enumerate(encoded, 1):
            if len(units) > self.max_length:
                raise UserError(f"sentence {number} has {len(units)} units; the model takes {self.max_length} at most")
        results = [""] * len(encoded)
        order = sorted((i for i, units in enumerate(encoded) if units), key=lambda i: len(encoded[i]))
        parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        for part in track(parts, "translate", "batch") if progress else parts:
            source, lengths = pad([encoded[i] for i in part])
            for i, units in zip(part, self._search(source.to(device), lengths.to(device)), strict=True):
                results[i] = self.vocabulary.decode(units)
        return results

    def _search(self, source: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
        state, end, method = self.model.start(source, lengths), self.model.end, self.method
        longest = min(source.size(1) + 50, self.max_length)
        if method.beam == 1:
            return greedy(state, len(source), end, longest, source.device)
        beam, penalty = method.beam, method.length_penalty
        return beam_search(state, len(source), end, longest, beam, penalty, source.device)

    def evaluate(
        self, pairs: Pairs, device: torch.device | str = "cpu", progress: bool = False
    ) -> tuple[dict[str, Any], list[str]]:
        """(figures, translations): BLEU and chrF of sacrebleu with its signature, sentences, target units a second."""
        try:
            import sacrebleu
        except ImportError:
            raise UserError(
                "BLEU needs the package 'sacrebleu', which is not installed; pip install sacrebleu"
            ) from None
        # a source with several translations is one sentence with several references
        references: dict[str, list[str]] = {}
        for source, target in pairs:
            references.setdefault(source, []).append(target)
        begun = time.perf_counter()
        found = dict(zip(references, self.translate(list(references), device, progress), strict=True))
        seconds = time.perf_counter() - begun
        units = sum(len(self.vocabulary.encode(text)) + 1 for text in found.values())
        bleu, chrf = sacrebleu.metrics.BLEU(), sacrebleu.metrics.CHRF()
        hypotheses = list(found.values())
        most = max(map(len, references.values()))
        columns: Any = [[r[n] if n < len(r) else None for r in references.values()] for n in range(most)]
        figures = {
            "bleu": round(bleu.corpus_score(hypotheses, columns).score, 2),
            "chrf": round(chrf.corpus_score(hypotheses, columns).score, 2),
            "sentences": len(references),
            "units_per_second": round(units / max(seconds, 1e-9), 1),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "signature": str(bleu.get_signature()),
        }
        return figures, [found[source] for source, _ in pairs]


def load_translator(path: str | Path) -> Translator:
    """The translator in a checkpoint folder, or in a run folder (its ``final/`` if there is one, else its ``best/``).

    Raises UserError when the folder is missing, damaged, or holds no translator, and when its vocabulary is not the one
    that the model was trained with.
    """
    with model_in(path, "translation", "translator") as (found, vocabulary):
        if not isinstance(vocabulary, Subwords):
            raise UserError("the vocabulary has no subwords")
        method, longest = Method(**found.meta["method"]), sys.maxsize
        model: Transformer | RNNTranslator
        if method.model == "transformer":
            config = TransformerConfig.from_dict(found.meta["model"])
            model, longest = Transformer(config), config.max_length - 1
        else:
            model = RNNTranslator(RNNConfig(**found.meta["model"]))
        model.load_state_dict(found.weights)
        return Translator(model, vocabulary, method, longest)
