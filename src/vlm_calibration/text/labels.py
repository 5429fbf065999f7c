"""What a query's words say of its image: which regions show the objects asked about, and whether those are there at all."""

from vlm_calibration.records import Query, RecordError
from vlm_calibration.text.grading import grade, parse_answer, same_phrase


def is_evidence(query: Query, label: str) -> bool:
    """Whether a region with this label shows what the question is about: its label is one of `objects`, or there are none.

    Case, articles and number do not count: "a Dog" and "dogs" are the object "dog".
    """
    return not query.objects or any(same_phrase(label, name) for name in query.objects)


def denies(query: Query) -> bool:
    """Whether the gold answer to a yes/no question is no."""
    return query.answer_type == "yes_no" and parse_answer(query.answer, "yes_no") == "no"


def check_answer(query: Query) -> None:
    """Make sure that replies can be graded by the gold answer.

    Raises:
        RecordError: a yes/no question whose answer is neither yes nor no, or an answer of nothing but punctuation.
    """
    if query.answer_type != "yes_no" and any(map(str.isalnum, query.answer)):
        return
    try:
        grade("", query.answer, query.answer_type)
    except ValueError as error:
        raise RecordError(f"record {query.id!r}: {error}") from error
