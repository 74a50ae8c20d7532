"""Questions whose answer is a span of a paragraph, as in SQuAD: files, the official scores, and sentence pairs made of
them."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glomo.data.files import PathLike
from glomo.errors import UserError


@dataclass(frozen=True)
class SpanExample:
    """A question, the paragraph that answers it, and the answers that people gave."""

    question: str
    paragraph: str
    answers: tuple[tuple[int, str], ...]
    """(first character in the paragraph, text) of each, at least one"""
    article: str = ""
    """whose paragraph it is: splits are made of whole articles"""


def read_spans(path: PathLike) -> list[SpanExample]:
    """Read a .json file of SQuAD's form (version 1.1), in file order.

    Raises:
        UserError: the file cannot be read, is not of that form, holds no question, or an answer does not stand where it
            is said to.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"{path} cannot be read ({reason}); a .json file of SQuAD's form is needed") from None
    return parse_spans(content, str(path))


def parse_spans(content: bytes, where: str) -> list[SpanExample]:
    """`read_spans` of a file's content; ``where`` begins the sentence about a mistake."""
    try:
        data = json.loads(content)["data"]
        found = [
            _example(question, str(paragraph["context"]), str(article.get("title", "")), where)
            for article in data
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{where} is not of SQuAD's form ({type(error).__name__}: {str(error)[:100]}); needed is "
            '{"data": [{"paragraphs": [{"context": ..., "qas": [{"question": ..., "answers": [...]}]}]}]}'
        ) from None
    if not found:
        raise UserError(f"{where} holds no question; at least one is needed")
    return found


def _example(question: Mapping[str, Any], paragraph: str, article: str, where: str) -> SpanExample:
    text = str(question["question"]).strip()
    answers = tuple((int(answer["answer_start"]), str(answer["text"])) for answer in question["answers"])
    if not answers:
        raise UserError(f"{where}: the question {text[:60]!r} has no answer, and at least one is needed")
    for start, answer in answers:
        if start < 0 or not answer or paragraph[start : start + len(answer)] != answer:
            there = paragraph[max(start, 0) : max(start, 0) + len(answer)]
            raise UserError(
                f"{where}: the answer {answer[:40]!r} to {text[:60]!r} is said to stand at character {start} of its "
                f"paragraph, where {there[:40]!r} stands"
            )
    return SpanExample(text, paragraph, answers, article)


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal_answer(text: str) -> list[str]:
    """The words of an answer as SQuAD's scores compare them: lower case, no punctuation, no articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(answer: str, right: Iterable[str]) -> float:
    """1 if the answer equals one of the right ones as `normal_answer` has them, else 0."""
    return float(normal_answer(answer) in [normal_answer(text) for text in right])


def span_f1(answer: str, right: Iterable[str]) -> float:
    """The greatest F1 of an answer's words with those of a right answer, each word as often as it is there:

    .. code-block:: text

        F1 = 2 p r / (p + r),   p = common / words of the answer,   r = common / words of the right one

    Source: Rajpurkar et al., EMNLP 2016, section 6.1.
    """
    return max((_f1(normal_answer(answer), normal_answer(text)) for text in right), default=0.0)


def _f1(answer: Sequence[str], right: Sequence[str]) -> float:
    common = sum((Counter(answer) & Counter(right)).values())
    return 2 * common / (len(answer) + len(right)) if common else float(answer == right)


_END = re.compile(r"""[.!?]+["')\]]*\s+(?=["'(\[]*[A-Z0-9])""")


def _sentences(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Where sentences begin and end: at marks before white space and a capital or digit, not within start to end."""
    ends = [match.end() for match in _END.finditer(text) if not start < match.end() <= end]
    return list(zip([0, *ends], [*ends, len(text)], strict=True))


def inference_pairs(examples: Iterable[SpanExample]) -> list[tuple[str, str, str]]:
    """(question, sentence, label): does the sentence answer the question?

    Of each question the sentence in which its first answer begins ("entailment"), and of the other sentences of the
    paragraph without that answer the one that has most of the question's words ("not_entailment"). A paragraph of one
    sentence gives nothing. A sentence ends at . ! or ? before white space and a capital or a digit, but not within the
    answer. (QNLI of GLUE is made so; its sentences are cut by another rule.)

    Source: Wang et al., ICLR 2019 (GLUE), section 2.3.
    """
    pairs = []
    for example in examples:
        start, answer = example.answers[0]
        sentences = _sentences(example.paragraph, start, start + len(answer))
        place = next((i for i, (first, end) in enumerate(sentences) if first <= start < end), None)
        if place is None or len(sentences) < 2:
            continue
        texts = [example.paragraph[first:end].strip() for first, end in sentences]
        pairs.append((example.question, texts[place], "entailment"))
        words = set(example.question.lower().split())
        others = [text for i, text in enumerate(texts) if i != place and answer.lower() not in text.lower() and text]
        if others:
            nearest = max(others, key=lambda text: len(words & set(text.lower().split())))
            pairs.append((example.question, nearest, "not_entailment"))
    return pairs
