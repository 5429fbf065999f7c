"""Facts that follow from a query's words: which regions are evidence, which objects are absent, and whether it can be taught."""

import re
from collections.abc import Collection

from vlm_calibration.records import Query, RecordError
from vlm_calibration.text.confidence import strip_confidence
from vlm_calibration.text.grading import grade, parse_answer
from vlm_calibration.text.matching import match_key, same_phrase

_EXISTENCE = re.compile(
    r"(?:is|are|was|were)(?:n['’]t)? there\b|(?:is|are) (?:an?|any|some|the)\b.*\b(?:visible|present|shown|depicted)\b|any\b"
    r"|(?:can|could|do|did) (?:you|we|i) (?:see|spot|find|notice|observe|detect|identify)\b"
    r"|(?=an? (?:[\w-]+ )?[\w-]+ *\?*$)|(?:does|do|did) (?:the|this|that) (?:image|picture|photo|photograph|scene)s? (?:show|contain|have|include|feature|depict)\b"
)
_NOT_EXISTENCE = re.compile(
    r"(?:only|exactly|more|fewer|less|at least|at most|\d+|one|two|three|four|five|six|seven|eight|nine|ten)\b"
    r"|(?:an?|any|some) (?:\w+ )?(?:contact|interaction|difference)\b|(?:direct|physical) (?:contact|interaction)\b"
)
"""After one of these forms: a number, or nothing that can be seen."""

# Every statement of confidence that is no bare number.
_STATES_CONFIDENCE = re.compile(
    "confiden|certain|sure|probabilit|likelihood|置信|信心|可信|確信", re.IGNORECASE
)
# As in the grounding parts of LLaVA-1.5's mix.
_COORDINATES = re.compile(r"\s*[\[(](?:\s*-?\d*\.?\d+\s*,){3}\s*-?\d*\.?\d+\s*[\])]\.?\s*")


def asked_existence(question: str) -> str | None:
    """What follows "is there" or the like in a question whether something is in the image, in lower case; else None."""
    question = question.strip().lower()
    match = _EXISTENCE.match(question)
    rest = question[match.end() :].strip() if match else ""
    return None if match is None or _NOT_EXISTENCE.match(rest) else rest


def denies_existence(query: Query) -> bool:
    """Whether the answer to a yes/no question says that what it asks for is not in the image: no, or yes to "Is there no dog?"."""
    rest = asked_existence(query.question) if query.answer_type == "yes_no" else None
    return rest is not None and answer_is_no(query) != rest.startswith("no ")


def absent_objects(query: Query) -> tuple[str, ...]:
    """The key objects that are not in the image: `absent`, or else the one that the question names first, if its existence is denied."""
    if query.absent or not query.objects or not denies_existence(query):
        return query.absent
    question = f" {match_key(query.question)} "
    # What is not named has the position -1, which goes behind all others.
    return (min(query.objects, key=lambda o: question.find(f" {match_key(o)} ") % (len(question) + 1)),)


def unlocated_objects(query: Query, labels: Collection[str]) -> list[str]:
    """The key objects that are not absent and that none of the regions, given by their labels, contains."""
    missing = [name for name in query.objects if not _is_one_of(name, labels)]
    return [name for name in missing if not _is_one_of(name, absent_objects(query))]


def question_form(query: Query) -> str:
    """The first four words of a question without articles, its key objects replaced: "what colour is _", "how many _ are"."""
    words = f" {match_key(query.question)} "
    for name in sorted(query.objects, key=len, reverse=True):
        words = words.replace(f" {match_key(name)} ", " _ ")
    return " ".join(words.split()[:4])


def is_evidence(query: Query, label: str) -> bool:
    """Whether a region with this label is evidence: the query has this object, absent or not (`same_phrase`), or has none."""
    names = (*query.objects, *query.absent)
    return not names or _is_one_of(label, names)


def _is_one_of(phrase: str, others: Collection[str]) -> bool:
    return phrase in others or any(same_phrase(phrase, other) for other in others)


def answer_is_no(query: Query) -> bool:
    """Whether the gold answer to a yes/no question is no."""
    return query.answer_type == "yes_no" and parse_answer(query.answer, "yes_no") == "no"


def check_answer(query: Query) -> None:
    """Check that replies can be graded against the gold answer, and that it states no confidence, which training would teach.

    A RecordError if the answer to a yes/no question is neither yes nor no, or the answer is only punctuation, states a confidence (a bare
    percentage is an answer), or is a box of coordinates.
    """
    answer, problem = query.answer.strip(), ""
    if _STATES_CONFIDENCE.search(answer) and strip_confidence(answer) != answer:
        problem = "states a confidence; remove it"
    elif _COORDINATES.fullmatch(answer):
        problem = "is a box of coordinates, which cannot be graded"
    if problem:
        raise RecordError(f"record {query.id!r}: the answer {answer[-60:]!r} {problem}")
    if query.answer_type != "yes_no" and any(map(str.isalnum, query.answer)):
        return
    try:
        grade("", query.answer, query.answer_type)
    except ValueError as error:
        raise RecordError(f"record {query.id!r}: {error}") from error
