"""Minimal pairs of subject and verb, made of short lists of words."""

from __future__ import annotations

from dataclasses import dataclass

_PEOPLE = [
    ("author", "authors"),
    ("doctor", "doctors"),
    ("farmer", "farmers"),
    ("king", "kings"),
    ("lady", "ladies"),
    ("man", "men"),
    ("soldier", "soldiers"),
    ("teacher", "teachers"),
]
_THINGS = [
    ("key", "keys", "to"),
    ("picture", "pictures", "of"),
    ("letter", "letters", "from"),
    ("road", "roads", "to"),
    ("book", "books", "about"),
    ("door", "doors", "of"),
    ("story", "stories", "about"),
    ("window", "windows", "near"),
]
_PLACES = [
    ("house", "houses"),
    ("garden", "gardens"),
    ("city", "cities"),
    ("church", "churches"),
    ("ship", "ships"),
    ("school", "schools"),
    ("king", "kings"),
    ("river", "rivers"),
]
_VERBS = [
    ("is", "are", "here"),
    ("was", "were", "old"),
    ("has", "have", "changed"),
    ("does", "do", "not matter"),
]
_ACTIONS = [("laughs", "laugh"), ("works", "work"), ("waits", "wait"), ("sings", "sing")]
_LOVES = [("knows", "know"), ("likes", "like"), ("sees", "see"), ("hates", "hate")]


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences that differ in one form: `before right after` and `before wrong after`."""

    construction: str
    before: str
    right: str
    wrong: str
    after: str

    @property
    def sentences(self) -> tuple[str, str]:
        """The right one and the wrong one."""
        return tuple(" ".join(filter(None, [self.before, form, self.after])) for form in (self.right, self.wrong))  # type: ignore[return-value]


def agreement_pairs() -> list[MinimalPair]:
    """96 pairs of six constructions, as many of each, half of each with a singular subject: who always chooses one form
    is right in half.

    .. code-block:: text

        simple                      the author is here                               (not: are)
        coordination                the author laughs and works                      (not: work)
        phrase, same number         the keys to the houses are here
        phrase, other number        the keys to the house are here                   ("house" is an attractor)
        clause, same number         the author that the doctor knows laughs
        clause, other number        the author that the doctors know laughs

    Source: after Linzen, Dupoux & Goldberg, TACL 2016, and Marvin & Linzen, EMNLP 2018; sentences of our own.
    """
    pairs = []
    for plural in (False, True):
        for i in range(8):
            pairs += _of_number(i, plural)
    order = list(dict.fromkeys(pair.construction for pair in pairs))
    return sorted(pairs, key=lambda pair: order.index(pair.construction))


def _of_number(i: int, plural: bool) -> list[MinimalPair]:
    """One pair of each construction."""
    person, other = _PEOPLE[i], _PEOPLE[(i + 3) % 8]
    singular, many, preposition = _THINGS[i]
    thing, place = (singular, many), _PLACES[i]
    *verb, rest = _VERBS[i % 4]
    action, second, love = _ACTIONS[i % 4], _ACTIONS[(i + 1) % 4], _LOVES[(i + i // 4) % 4]

    def pair(construction: str, before: str, forms: list[str] | tuple[str, str], after: str) -> MinimalPair:
        return MinimalPair(construction, before, forms[plural], forms[not plural], after)

    pairs = [
        pair("simple", f"the {person[plural]}", verb, rest),
        pair("coordination", f"the {person[plural]} {action[plural]} and", second, ""),
    ]
    for name, number in (("same", plural), ("other", not plural)):
        phrase = f"the {thing[plural]} {preposition} the {place[number]}"
        clause = f"the {person[plural]} that the {other[number]} {love[number]}"
        pairs.append(pair(f"phrase, {name} number", phrase, verb, rest))
        pairs.append(pair(f"clause, {name} number", clause, action, ""))
    return pairs
