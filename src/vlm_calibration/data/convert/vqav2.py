"""VQAv2 (Goyal et al., arXiv 1612.00837) and VQA (Antol et al., arXiv 1505.00468): questions with the answers of ten annotators."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from sys import intern
from typing import Any

from vlm_calibration.data.convert.reading import Source, explained, json_values
from vlm_calibration.records import RecordError
from vlm_calibration.text.conventions import agreed_answers
from vlm_calibration.text.grading import parse_answer

TYPES = {"yes/no": "yes_no", "number": "number", "other": "other"}
"""Answer type of an annotation -> the first part of the category."""


def vqav2(questions: Path, annotations: Path, *, file_name: str = "COCO_{split}_{id:012d}.jpg") -> Source:
    """Convert VQAv2: its questions and annotations about COCO's images.

    The gold answer is the annotators' most frequent; others that at least three of them give become synonyms, as in VQA's metric.
    Ids are those of the questions, categories "ANSWER TYPE/QUESTION TYPE", such as "yes_no/is the".

    Args:
        questions: e.g. v2_OpenEnded_mscoco_train2014_questions.json
        annotations: e.g. v2_mscoco_train2014_annotations.json
        file_name: name of an image; {split} is the file's data_subtype, such as train2014, {id} the image_id
    """
    answers: dict[int, dict[str, Any]] = {}
    for where, value in json_values(annotations, "annotations.item"):
        with explained(where):
            answers[value["question_id"]] = _answer(value)
    split = next(json_values(questions, "data_subtype"))[1] if "{split" in file_name else ""
    with explained(f"--file-name {file_name}"):
        file_name.format(split=split, id=1)
    for where, question in json_values(questions, "questions.item"):
        yield where, partial(_query, question, answers, annotations, partial(file_name.format, split=split))


def _answer(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a query that follow from an annotation."""
    kind, gold = annotation["answer_type"], annotation["multiple_choice_answer"]
    if kind not in TYPES:
        raise RecordError(f"'answer_type' must be one of {', '.join(TYPES)}, found {kind!r}")
    given = [a["answer"] for a in annotation["answers"] if a["answer"].strip()]
    # A question of the form "Is it red or blue?" counts as yes/no, whatever its answer.
    is_yes_no = kind == "yes/no" and parse_answer(gold, "yes_no") is not None
    return {
        "answer": intern(gold),
        "answer_type": "yes_no" if is_yes_no else "short",
        "category": intern(f"{TYPES[kind]}/{annotation['question_type'].replace('/', ' ')}"),
        "synonyms": list(agreed_answers(given, gold)),
    }


def _query(
    question: Mapping[str, Any], answers: Mapping[int, dict[str, Any]], annotations: Path, image: Any
) -> list[dict[str, Any]]:
    identifier = question["question_id"]
    if identifier not in answers:
        raise RecordError(f"question {identifier} has no annotation in {annotations}")
    asked = {"id": identifier, "image": image(id=question["image_id"]), "question": question["question"]}
    return [asked | answers[identifier]]
