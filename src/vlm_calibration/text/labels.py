"""Facts about an image that follow from a query's words: which regions are evidence, and whether the object is absent."""

from vlm_calibration.records import Query, RecordError
from vlm_calibration.text.grading import grade, parse_answer
from vlm_calibration.text.matching import same_phrase


def is_evidence(query: Query, label: str) -> bool:
    """Whether a region with this label is evidence: the label is one of the query's `objects`, or the query has none.

    Case, articles and number are ignored: "a Dog" and "dogs" match the object "dog".
    """
    return not query.objects or any(same_phrase(label, name) for name in query.objects)


def answer_is_no(query: Query) -> bool:
    """Whether the gold answer to a yes/no question is no."""
    return query.answer_type == "yes_no" and parse_answer(query.answer, "yes_no") == "no"


def check_answer(query: Query) -> None:
    """Check that replies can be graded against the gold answer.

    Raises:
        RecordError: the answer to a yes/no question is neither yes nor no, or the answer is only punctuation.
    """
    if query.answer_type != "yes_no" and any(map(str.isalnum, query.answer)):
        return
    try:
        grade("", query.answer, query.answer_type)
    except ValueError as error:
        raise RecordError(f"record {query.id!r}: {error}") from error
