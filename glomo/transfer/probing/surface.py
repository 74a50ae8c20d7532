"""Surface tasks: what can be asked of a representation with nothing but raw texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Tokenize = Callable[[str], list[str]]
PUBLISHED_BINS = ((5, 8), (9, 12), (13, 16), (17, 20), (21, 25), (26, 28))
"""lengths, both ends included, of Conneau et al. 2018"""


@dataclass(frozen=True)
class SurfaceTask:
    """Texts with labels; every class has as many."""

    texts: list[str]
    labels: list[int]
    classes: list[str]
    """their names, by label"""
    sources: list[int]
    """which of the given texts each is (made of)"""
    left_out: int
    """given texts that fit no class, or were too many of theirs"""


@dataclass(frozen=True)
class PositionTask:
    """Units with their positions; every position has as many."""

    rows: Tensor
    """units, counted through all texts as by `layer_features(..., pool="units")`"""
    labels: Tensor
    """0: the first of its text"""
    documents: Tensor
    """the text of each"""


def length_task(
    texts: Sequence[str],
    generator: torch.Generator,
    bins: int | Sequence[tuple[int, int]] = 6,
    tokenize: Tokenize = str.split,
) -> SurfaceTask:
    """How long is the sentence? The classes are ranges of lengths in tokens.

    Args:
        texts: sentences.
        generator: draws those that stay where a class has too many.
        bins: how many ranges, by the texts' quantiles; or the ranges, both ends included, such as `PUBLISHED_BINS`.
        tokenize: text to tokens.

    Raises:
        ValueError: ranges overlap or are not in order, no text is in one, or the texts have fewer lengths than bins.

    Source: Conneau et al., ACL 2018 (SentLen).
    """
    lengths = [len(tokenize(text)) for text in texts]
    ranges = _quantile_ranges(lengths, bins) if isinstance(bins, int) else [(first, last) for first, last in bins]
    ends = [end for pair in ranges for end in pair]
    if len(ranges) < 2 or ends != sorted(ends) or any(a[1] == b[0] for a, b in pairwise(ranges)):
        raise ValueError(f"the ranges of lengths are {ranges}; at least two, in order and without overlap, are needed")
    members = [[i for i, n in enumerate(lengths) if first <= n <= last] for first, last in ranges]
    names = [f"{first}-{last}" if first < last else f"{first}" for first, last in ranges]
    chosen = _balanced(members, names, generator)
    return _task([(texts[i], label, i) for i, label in chosen], names, len(texts))


def content_task(
    texts: Sequence[str],
    generator: torch.Generator,
    words: int | Sequence[str] = 1000,
    first_rank: int = 2000,
    per_word: int = 120,
    tokenize: Tokenize = str.split,
) -> SurfaceTask:
    """Which of these words is in the sentence? Every sentence has exactly one of them, once.

    Words of middle frequency are taken: behind the `first_rank` most frequent ones (equally frequent ones by their
    letters), of four letters or more, in lower case. Those with fewer than `per_word` such sentences are left out, the
    rarest first, so that there may be fewer classes than `words`.

    Args:
        texts: sentences.
        generator: draws those that stay where a word has more than the others.
        words: how many, or the words themselves (of which none is left out).
        per_word: sentences of a word, at least.
        tokenize: text to tokens, which are compared in lower case.

    Raises:
        ValueError: fewer than two words are left, or one of those given has too few sentences.

    Source: Conneau et al., ACL 2018 (WC).
    """
    tokens = [[token.lower() for token in tokenize(text)] for text in texts]
    if isinstance(words, int):
        counts = Counter(token for sentence in tokens for token in sentence)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[first_rank:]
        candidates = [word for word in ranked if len(word) >= 4][:words]
    else:
        candidates = [word.lower() for word in words]
        if len(set(candidates)) < len(candidates):
            raise ValueError(f"the words are {', '.join(candidates)}; every one must be there once")
    alone = _alone(tokens, candidates, per_word if isinstance(words, int) else 0)
    if len(alone) < 2:
        raise ValueError(
            f"{len(alone)} of {len(candidates)} words have {per_word} sentences to themselves; at least 2 are needed: "
            "more texts, a lower first_rank or per_word"
        )
    few = next((word for word in alone if len(alone[word]) < per_word), None)
    if few is not None:
        raise ValueError(f"{few!r} is alone in {len(alone[few])} sentences; at least {per_word} are needed")
    names = list(alone)
    chosen = _balanced([alone[word] for word in names], names, generator)
    return _task([(texts[i], label, i) for i, label in chosen], names, len(texts))


def shift_task(texts: Sequence[str], generator: torch.Generator, tokenize: Tokenize = str.split) -> SurfaceTask:
    """Have two adjacent words been swapped? Half of the texts are as they were, in half one pair is inverted.

    The pair is drawn from all that are different words, neither of them the first of the sentence nor a punctuation
    mark. Texts without such a pair, or with double quotes, are in neither class: they would tell the classes apart. All
    texts come out as tokens with one space between.

    Args:
        texts: sentences.
        generator: draws the texts and the pairs.
        tokenize: text to tokens; punctuation marks should be tokens, or they move along with their words and tell.

    Raises:
        ValueError: fewer than two texts have such a pair.

    Source: Conneau et al., ACL 2018 (BShift).
    """
    tokens = [tokenize(text) for text in texts]
    pairs = {i: _swappable(sentence) for i, sentence in enumerate(tokens)}
    able = [i for i in pairs if pairs[i]]
    if len(able) < 2:
        raise ValueError(f"{len(able)} of {len(texts)} texts have two adjacent words to swap; at least 2 are needed")
    order = [able[i] for i in torch.randperm(len(able), generator=generator).tolist()]
    half = len(order) // 2
    rows = [(" ".join(tokens[i]), 0, i) for i in order[:half]]
    for i in order[half : 2 * half]:
        place = pairs[i][int(torch.randint(len(pairs[i]), (), generator=generator))]
        sentence = list(tokens[i])
        sentence[place : place + 2] = sentence[place + 1], sentence[place]
        rows.append((" ".join(sentence), 1, i))
    return _task(rows, ["original", "inverted"], len(texts))


def position_task(lengths: Sequence[int], positions: int, generator: torch.Generator) -> PositionTask:
    """Where in its text does a unit stand? Labels of units: 0 for the first of a text, up to positions - 1.

    Args:
        lengths: units of each text.
        positions: how many are asked for; units behind are left out.
        generator: draws those that stay where a position has more than the last.

    Raises:
        ValueError: positions is below 2, or no text is that long.
    """
    if positions < 2:
        raise ValueError(f"positions is {positions}; at least 2 are needed")
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    members = [[i for i, length in enumerate(lengths) if length > place] for place in range(positions)]
    chosen = _balanced(members, [f"position {place}" for place in range(positions)], generator)
    rows = sorted((starts[text] + place, place, text) for text, place in chosen)
    return PositionTask(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def _task(rows: Sequence[tuple[str, int, int]], classes: list[str], given: int) -> SurfaceTask:
    rows = sorted(rows, key=lambda row: row[2])
    texts, labels, sources = (list(column) for column in zip(*rows, strict=True))
    return SurfaceTask(texts, labels, classes, sources, given - len(rows))


def _balanced(
    members: Sequence[Sequence[int]], names: Sequence[str], generator: torch.Generator
) -> list[tuple[int, int]]:
    """(member, class), as many of each class as the smallest has."""
    empty = [name for name, group in zip(names, members, strict=True) if not group]
    if empty:
        raise ValueError(f"no text is of the class {empty[0]!r}; every class needs one")
    size = min(map(len, members))
    chosen = []
    for label, group in enumerate(members):
        order = torch.randperm(len(group), generator=generator)[:size]
        chosen += [(group[i], label) for i in order.tolist()]
    return chosen


def _quantile_ranges(lengths: Sequence[int], bins: int) -> list[tuple[int, int]]:
    """Ranges of lengths that hold as equally many texts as whole lengths allow."""
    counts = sorted(Counter(lengths).items())
    if bins < 2 or len(counts) < bins:
        raise ValueError(f"the texts have {len(counts)} different lengths; {bins} bins need at least {max(bins, 2)}")
    lasts, seen, place = [], 0, 0
    for number in range(1, bins + 1):
        most = len(counts) - (bins - number)  # the bins behind need a length each
        seen, place = seen + counts[place][1], place + 1
        # one length more as long as that is nearer to the quantile
        goal = len(lengths) * number / bins
        while place < most and (number == bins or abs(seen + counts[place][1] - goal) <= abs(seen - goal)):
            seen, place = seen + counts[place][1], place + 1
        lasts.append(place)
    return [(counts[a][0], counts[b - 1][0]) for a, b in pairwise([0, *lasts])]


def _alone(tokens: Sequence[Sequence[str]], words: Sequence[str], least: int) -> dict[str, list[int]]:
    """For each word the sentences that have it once, and none of the others; words with fewer than `least` such
    sentences are left out one by one (of equal ones the last), as each that goes leaves sentences to others."""
    found: dict[str, list[int]] = {word: [] for word in words}
    holders: dict[str, list[int]] = {word: [] for word in words}
    held = [[token for token in sentence if token in found] for sentence in tokens]
    for i, targets in enumerate(held):
        for word in targets:
            holders[word].append(i)
        if len(targets) == 1:
            found[targets[0]].append(i)
    while found:
        rarest = min(reversed(found), key=lambda word: len(found[word]))
        if len(found[rarest]) >= least:
            break
        del found[rarest]
        for i in dict.fromkeys(holders[rarest]):
            held[i] = [token for token in held[i] if token != rarest]
            if len(held[i]) == 1:
                found[held[i][0]].append(i)
    return {word: sorted(sentences) for word, sentences in found.items()}


def _swappable(sentence: Sequence[str]) -> list[int]:
    """Places of the first word of a pair that may be swapped."""
    if any('"' in token for token in sentence):
        return []
    is_word = [place > 0 and any(map(str.isalnum, token)) for place, token in enumerate(sentence)]
    return [
        place
        for place in range(len(sentence) - 1)
        if is_word[place] and is_word[place + 1] and sentence[place].lower() != sentence[place + 1].lower()
    ]
