"""Zero-shot by phonemes: recognise phonemes, and look up in a lexicon which word they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glomo.nn.precision import wide
from glomo.transfer.zero_shot.lexicon import BLANK, Lexicon

_CHUNK = 4096  # pronunciations at a time: large lexicons need no more memory


def ctc_word_scores(log_probs: Tensor, lengths: Tensor, lexicon: Lexicon) -> Tensor:
    """log P(word | frames) for every word of a lexicon, (B, words):

    .. code-block:: text

        P(word | x) = sum over its pronunciations, sum over the paths that CTC collapses to it, prod_t p(path_t | x_t)

    -inf for a word that has too many phonemes for the frames. The scores have no gradient: train the recogniser with
    `torch.nn.functional.ctc_loss` on the words that have examples.

    Args:
        log_probs: (B, T, 1 + phonemes): log-probabilities of each frame, the blank first.
        lengths: (B,): frames of each example, 1 to T; what follows them does not count.
        lexicon: the words, with or without examples.

    Raises:
        ValueError: other shapes, or lengths out of range.

    Source: Graves et al., ICML 2006.
    """

    def score(frames: Tensor, targets: Tensor, sizes: Tensor) -> Tensor:
        batch = frames[:, None].expand(-1, len(targets), -1)
        steps = torch.full_like(sizes, len(frames))
        return -F.ctc_loss(batch, targets, steps, sizes, blank=BLANK, reduction="none")

    return _word_scores(log_probs, lengths, lexicon, score)


def aligned_word_scores(log_probs: Tensor, lengths: Tensor, lexicon: Lexicon) -> Tensor:
    """log P(word | positions) for every word of a lexicon, (B, words), where each position is one phoneme:

    .. code-block:: text

        P(word | x) = sum over its pronunciations of as many phonemes as positions, prod_l p(phoneme_l | x_l)

    -inf for a word that has no pronunciation of that length. The scores have no gradient: train the recogniser with a
    cross-entropy at each position.

    Args:
        log_probs: (B, L, 1 + phonemes): log-probabilities of each position; the first column, CTC's blank, is no
            phoneme.
        lengths: (B,): positions of each example, 1 to L; what follows them does not count.
        lexicon: the words, with or without examples.

    Raises:
        ValueError: other shapes, or lengths out of range.
    """

    def score(positions: Tensor, targets: Tensor, sizes: Tensor) -> Tensor:
        count = len(positions)
        phonemes = F.pad(targets, (0, max(0, count - targets.size(1))), value=BLANK)[:, :count]
        return positions.gather(1, phonemes.T).sum(0).masked_fill(sizes != count, -torch.inf)

    return _word_scores(log_probs, lengths, lexicon, score)


@torch.no_grad()
def _word_scores(
    log_probs: Tensor, lengths: Tensor, lexicon: Lexicon, score: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """`score` of each example and pronunciation, added up over the pronunciations of a word."""
    width = len(lexicon.phonemes) + 1
    if log_probs.dim() != 3 or log_probs.size(2) != width or lengths.shape != log_probs.shape[:1]:
        raise ValueError(
            f"log_probs have the shape {tuple(log_probs.shape)} and lengths {tuple(lengths.shape)}; (B, T, {width}), "
            "for the blank and the lexicon's phonemes, and (B,) are needed"
        )
    sizes: list[int] = lengths.tolist()
    if sizes and not 1 <= min(sizes) <= max(sizes) <= log_probs.size(1):
        raise ValueError(f"lengths go from {min(sizes)} to {max(sizes)}; from 1 to {log_probs.size(1)} is needed")
    log_probs = wide(log_probs)
    targets, counts, owners = (t.to(log_probs.device) for t in (lexicon.targets, lexicon.lengths, lexicon.owners))
    scores = log_probs.new_zeros(len(sizes), len(owners))
    for row, size in enumerate(sizes):
        parts = zip(targets.split(_CHUNK), counts.split(_CHUNK), strict=True)
        scores[row] = torch.cat([score(log_probs[row, :size], *part) for part in parts])
    return _grouped_logsumexp(scores, owners, len(lexicon.words))


def _grouped_logsumexp(scores: Tensor, owners: Tensor, groups: int) -> Tensor:
    """Of the columns of each group: (B, P) to (B, groups)."""
    owners = owners.expand_as(scores)
    highest = scores.new_full((len(scores), groups), -torch.inf).scatter_reduce(1, owners, scores, "amax")
    shift = highest.clamp(min=torch.finfo(scores.dtype).min)  # -inf - -inf would be no number
    total = torch.zeros_like(shift).scatter_add(1, owners, (scores - shift.gather(1, owners)).exp())
    return total.log() + shift
