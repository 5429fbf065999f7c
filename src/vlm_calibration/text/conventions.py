"""Conventions of published question-answer data: format requests in questions, and answers whose type no field names."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from vlm_calibration.records import AnswerType, RecordError
from vlm_calibration.text.grading import parse_answer
from vlm_calibration.text.matching import match_key

AnswerTypeChoice = Literal["infer", "yes_no", "short", "open"]
"""An answer type for all answers of a source, or `infer`: see `infer_answer_type`."""

MIN_AGREEING = 3
"""Number of annotators from which VQA's metric counts an answer as fully correct (Antol et al., arXiv 1505.00468)."""

_FORMAT_REQUEST = (
    r"(?:please )?(?:give (?:a|an) |answer )(?:the question |short answer )?(?:with|using|in|by)"
    r"(?: only)? (?:a single|one|a) word(?: or (?:a )?(?:short )?phrase)?\.?"
)
_AT_END = re.compile(rf"(?:(?<=\s)|(?<=[.?!])){_FORMAT_REQUEST}\s*\Z", re.IGNORECASE)
_AT_BEGIN = re.compile(rf"\A\s*{_FORMAT_REQUEST}(?:(?<=\.)\s+|\s*\n\s*)(?=\S)", re.IGNORECASE)
_YES_NO = re.compile(r"\s*(?:yes|no)\s*(?:[.,;:!—–-]|\Z)", re.IGNORECASE)


def strip_format_request(question: str) -> str:
    """Remove LLaVA-1.5's "Answer the question using a single word or phrase." from either end of a question.

    Requests that the answer depends on, such as "Answer with the option's letter from the given choices directly.", stay.
    """
    stripped = _AT_BEGIN.sub("", _AT_END.sub("", question)).strip()
    return stripped or question.strip()


def infer_answer_type(answer: str) -> AnswerType:
    """The type by form: "yes_no" for yes or no, explained or not; "short" up to four words; else "open"."""
    if _YES_NO.match(answer) and parse_answer(answer, "yes_no") is not None:
        return "yes_no"
    return "short" if len(answer.split()) <= 4 else "open"


def combine_answers(answers: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The gold answer of a question with several answers, and the other correct ones.

    Fewer than ten are variants that are all correct, the first is the gold answer. Ten or more are those of annotators, as in VQAv2:
    the most frequent is the gold answer, and others count if at least `MIN_AGREEING` annotators give them.

    Raises:
        RecordError: there is no answer.
    """
    given = [answer.strip() for answer in answers if answer and answer.strip()]
    if not given:
        raise RecordError("the list of answers is empty")
    if len(answers) < 10:
        return given[0], tuple(dict.fromkeys(a for a in given[1:] if match_key(a) != match_key(given[0])))
    gold = Counter(given).most_common(1)[0][0]
    return gold, agreed_answers(given, gold)


def agreed_answers(answers: Sequence[str], gold: str) -> tuple[str, ...]:
    """The answers of annotators, other than the gold answer, that at least `MIN_AGREEING` of them give."""
    counts = Counter(answers)
    return tuple(
        answer for answer, n in counts.items() if n >= MIN_AGREEING and match_key(answer) != match_key(gold)
    )
