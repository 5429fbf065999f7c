"""Conventions of published question-answer data: format requests in questions, and answers whose type or confidence no field names."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from vlm_calibration.records import AnswerType, RecordError
from vlm_calibration.text.confidence import strip_confidence
from vlm_calibration.text.grading import parse_answer
from vlm_calibration.text.matching import match_key

AnswerTypeChoice = Literal["infer", "yes_no", "short", "open"]
"""An answer type for all answers of a source, or `infer`: see `infer_answer_type`."""

MAX_SHORT_WORDS = 4
"""Longest answer, in words, that counts as short."""
ANNOTATORS = 10
"""Number of annotators that answer a question of VQAv2 and of the data sets that follow it."""
MIN_AGREEING = 3
"""Number of annotators from which VQA's metric counts an answer as fully correct (Antol et al., arXiv 1505.00468)."""

_FORMAT_REQUEST = (
    r"(?:please )?(?:give (?:a|an) |answer )(?:the question |short answer )?(?:with|using|in|by)"
    r"(?: only)? (?:a single|one|a) word(?: or (?:a )?(?:short )?phrase)?\.?"
)
_AT_END = re.compile(rf"(?:(?<=\s)|(?<=[.?!])){_FORMAT_REQUEST}\s*\Z", re.IGNORECASE)
_AT_BEGIN = re.compile(rf"\A\s*{_FORMAT_REQUEST}(?:(?<=\.)\s+|\s*\n\s*)(?=\S)", re.IGNORECASE)
_YES_NO = re.compile(r"\s*(?:yes|no)\s*(?:[.,;:!—–-]|\Z)", re.IGNORECASE)
_BOX = re.compile(r"\s*[\[(](?:\s*-?\d*\.?\d+\s*,){3}\s*-?\d*\.?\d+\s*[\])]\.?\s*")
_CONFIDENCE = ("confiden", "certain", "sure", "probabilit", "likelihood", "置信", "信心", "可信", "確信")
"""One of these is part of every statement of confidence that is no bare number."""


def strip_format_request(question: str) -> str:
    """Remove LLaVA-1.5's "Answer the question using a single word or phrase." from the end or begin of a question.

    The elicitation prompt makes its own request (see `text.prompts`). Requests that the answer depends on, such as "Answer with the
    option's letter from the given choices directly.", stay.
    """
    stripped = _AT_BEGIN.sub("", _AT_END.sub("", question)).strip()
    return stripped or question.strip()


def infer_answer_type(answer: str) -> AnswerType:
    """The type of an answer by its form.

    "yes_no" if it is yes or no, possibly with an explanation ("No, it is red."); "short" up to `MAX_SHORT_WORDS` words; else "open".
    """
    if _YES_NO.match(answer) and parse_answer(answer, "yes_no") is not None:
        return "yes_no"
    return "short" if len(answer.split()) <= MAX_SHORT_WORDS else "open"


def check_trainable(answer: str) -> None:
    """Make sure that a gold answer is a text that can be graded, and states no confidence, which training would teach beside its own.

    A bare percentage ("50%") is an answer.

    Raises:
        RecordError: the answer states a confidence, or is a box of coordinates, as in the grounding parts of LLaVA-1.5's mix.
    """
    folded = answer.casefold()
    if any(word in folded for word in _CONFIDENCE) and strip_confidence(answer) != answer.strip():
        raise RecordError(
            f"the answer states a confidence: {answer.strip()[-60:]!r}; remove it from the answer"
        )
    if _BOX.fullmatch(answer):
        raise RecordError(f"the answer is a box of coordinates, which cannot be graded: {answer.strip()!r}")


def combine_answers(answers: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The gold answer of a question with several answers, and the other correct ones.

    Fewer answers than VQA's ten are variants that are all correct, the first is the gold answer. Ten or more are those of annotators:
    the most frequent is the gold answer, and others count if at least `MIN_AGREEING` annotators give them.

    Raises:
        RecordError: there is no answer.
    """
    given = [answer.strip() for answer in answers if answer and answer.strip()]
    if not given:
        raise RecordError("the list of answers is empty")
    if len(answers) < ANNOTATORS:
        return given[0], tuple(dict.fromkeys(a for a in given[1:] if match_key(a) != match_key(given[0])))
    gold = Counter(given).most_common(1)[0][0]
    return gold, agreed_answers(given, gold)


def agreed_answers(answers: Sequence[str], gold: str) -> tuple[str, ...]:
    """The answers of annotators, other than the gold answer, that at least `MIN_AGREEING` of them give."""
    counts = Counter(answers)
    return tuple(
        answer for answer, n in counts.items() if n >= MIN_AGREEING and match_key(answer) != match_key(gold)
    )
