"""Source for VQA (Antol et al., arXiv 1505.00468; VQAv2: Goyal et al., arXiv 1612.00837): its questions, annotations and COCO's images.

The gold answer is the most frequent of the ten annotators' answers (`multiple_choice_answer`). What at least three of them answer is
fully correct by VQA's metric, and becomes a synonym. The data set has no regions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.data.sources.base import OnBadRecord
from vlm_calibration.data.sources.published import PublishedSource
from vlm_calibration.json_stream import JsonItem, json_members
from vlm_calibration.records import DataError, RecordError, short_repr
from vlm_calibration.text.conventions import agreed_answers
from vlm_calibration.text.grading import parse_answer

TYPES = {"yes/no": "yes_no", "number": "number", "other": "other"}
"""Answer type of an annotation -> the first part of the category, which separates its parts by "/"."""


class Annotation(NamedTuple):
    """What is kept of an annotation: the gold answer, other correct answers, answer type and question type."""

    answer: Any
    synonyms: tuple[str, ...]
    answer_type: str
    question_type: str


class VqaSource(PublishedSource):
    """One query a question; its id is `question_id`, its category "ANSWER TYPE/QUESTION TYPE", such as "yes_no/is the".

    Args:
        questions: e.g. `v2_OpenEnded_mscoco_train2014_questions.json`.
        annotations: e.g. `v2_mscoco_train2014_annotations.json`.
        root: image folder, e.g. COCO's `train2014`.
        file_name: name of an image by its id; "{split}" is the file's `data_subtype`, "{id:012d}" the id in twelve digits.
        begin: use the images from this share on, in [0, 1]; see `ImageShare`.
        end: use the images up to this share, in [0, 1].
        on_bad_record: "raise" stops at the first invalid question; "skip" leaves such questions out, with a warning.
    """

    def __init__(
        self,
        questions: str,
        annotations: str,
        root: str,
        file_name: str = "COCO_{split}_{id:012d}.jpg",
        begin: float = 0.0,
        end: float = 1.0,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        super().__init__(questions, root, begin, end, on_bad_record)
        self.questions = questions
        self.annotations = annotations
        self.file_name = file_name
        try:
            file_name.format(split="val2014", id=1)
        except (ValueError, LookupError, AttributeError) as error:
            raise DataError(
                f"file_name: expected a pattern such as COCO_{{split}}_{{id:012d}}.jpg, found {file_name!r} ({error})"
            ) from error

    def _rows(self) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
        split = self._split() if "{split" in self.file_name else ""
        annotations = dict(_annotations(Path(self.annotations)))
        for item in _elements(self.path, "questions"):
            try:
                row: dict[str, Any] | RecordError = self._row(item.value, split, annotations)
            except RecordError as error:
                row = error
            yield item.where, row

    def _row(self, value: Any, split: str, annotations: Mapping[int, Annotation]) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise RecordError(f"expected a question, found {short_repr(value)}")
        question_id, image_id = (_number(value, key) for key in ("question_id", "image_id"))
        annotation = annotations.get(question_id)
        if annotation is None:
            raise RecordError(f"question {question_id} has no annotation in {self.annotations}")
        answer_type = "short"
        if annotation.answer_type == "yes/no" and parse_answer(str(annotation.answer), "yes_no"):
            answer_type = "yes_no"
        return {
            "id": str(question_id),
            "image": self.file_name.format(split=split, id=image_id),
            "question": value.get("question"),
            "answer": annotation.answer,
            "answer_type": answer_type,
            "category": f"{TYPES[annotation.answer_type]}/{annotation.question_type.replace('/', ' ')}",
            "synonyms": list(annotation.synonyms),
        }

    def _split(self) -> str:
        """The `data_subtype` of the questions."""
        for item in json_members(self.path, open_arrays=True):
            if item.key == "data_subtype" and isinstance(item.value, str):
                return item.value
        raise DataError(f"{self.path}: no data_subtype: give `file_name` without {{split}}")


def _annotations(path: Path) -> Iterator[tuple[int, Annotation]]:
    for item in _elements(path, "annotations"):
        yield item.read(_annotation)


def _annotation(value: Any) -> tuple[int, Annotation]:
    if not isinstance(value, Mapping):
        raise RecordError(f"expected an annotation, found {short_repr(value)}")
    question_id = _number(value, "question_id")
    answer_type, question_type = value.get("answer_type"), value.get("question_type")
    if answer_type not in TYPES or not isinstance(question_type, str):
        raise RecordError(
            f"annotation of question {question_id}: needs a question_type, and an answer_type of {', '.join(TYPES)}, found "
            f"{short_repr(question_type)} and {short_repr(answer_type)}"
        )
    answers, gold = value.get("answers"), value.get("multiple_choice_answer")
    if not isinstance(answers, list) or not all(
        isinstance(a, Mapping) and isinstance(a.get("answer"), str) for a in answers
    ):
        raise RecordError(
            f"annotation of question {question_id}: 'answers' must be a list of objects with an 'answer'"
        )
    synonyms = agreed_answers([a["answer"] for a in answers if a["answer"].strip()], str(gold))
    if isinstance(gold, str):
        gold = sys.intern(gold)
    return question_id, Annotation(gold, synonyms, sys.intern(answer_type), sys.intern(question_type))


def _elements(path: Path, key: str) -> Iterator[JsonItem]:
    """The elements of an array at the top of a file; DataError if there is no such array."""
    is_there = False
    for item in json_members(path, open_arrays=True):
        if item.key == key:
            is_there = True
            yield item
    if not is_there:
        raise DataError(f"{path}: no {key} in this file: expected a file of VQA's {key}")


def _number(value: Mapping[str, Any], key: str) -> int:
    number = value.get(key)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise RecordError(f"{key!r} must be a whole number, found {short_repr(number)}")
    return number
