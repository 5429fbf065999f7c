"""VQAv2: gold answers, synonyms by VQA's metric, answer types, and names of COCO's images."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.data.sources.vqa import VqaSource
from vlm_calibration.records import DataError
from vlm_calibration.text.grading import grade

from .published import VQA_ROWS, write_vqa


def test_questions_with_their_annotations(tmp_path: Path) -> None:
    source = VqaSource(*write_vqa(tmp_path))
    other, yes_no, number = source.queries()
    assert (other.id, other.image) == ("262148000", "COCO_val2014_000000262148.jpg")
    assert (other.question, other.answer, other.answer_type) == ("Where is he looking?", "down", "short")
    assert other.synonyms == ("at table",)
    assert other.category == "other/where is"
    assert (yes_no.answer, yes_no.answer_type, yes_no.category) == ("no", "yes_no", "yes_no/is")
    assert (number.answer, number.answer_type, number.synonyms) == ("2", "short", ())
    assert source.load(number).image.shape == (10, 20, 3)
    assert list(pickle.loads(pickle.dumps(source)).queries()) == [other, yes_no, number]


def _vqa_accuracy(answer: str, answers: list[str]) -> float:
    """VQA's published metric: the mean of min(matches / 3, 1) over all subsets of nine annotators."""
    scores = [
        min(sum(a == answer for j, a in enumerate(answers) if j != i) / 3, 1) for i in range(len(answers))
    ]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("row", [VQA_ROWS[0], VQA_ROWS[2]])
def test_correct_answers_are_those_of_the_metric(tmp_path: Path, row: tuple[Any, ...]) -> None:
    """An answer is correct if at least three annotators gave it, whose accuracy is 0.9 or more."""
    [query] = VqaSource(*write_vqa(tmp_path, (row,))).queries()
    for answer in set(row[-1]):
        correct = grade(answer, query.answer, query.answer_type, query.synonyms).correct
        assert correct == (_vqa_accuracy(answer, row[-1]) >= 0.9), answer


def test_a_yes_no_question_with_another_answer_is_short(tmp_path: Path) -> None:
    row = (1, 1, "Is it red or blue?", "yes/no", "red", ["red"] * 10)
    assert VqaSource(*write_vqa(tmp_path, (row,))).queries()[0].answer_type == "short"


def test_other_names_of_images(tmp_path: Path) -> None:
    questions, annotations, root = write_vqa(tmp_path, VQA_ROWS[:1])
    (Path(root) / "000000262148.jpg").touch()
    [query] = VqaSource(questions, annotations, root, file_name="{id:012d}.jpg").queries()
    assert query.image == "000000262148.jpg"
    for pattern in ("{id:s}", "{", "{no}.jpg"):
        with pytest.raises(DataError, match="file_name"):
            VqaSource(questions, annotations, root, file_name=pattern)


def test_shares_have_no_image_in_common(tmp_path: Path) -> None:
    rows = tuple((i, i // 3, "What is this?", "other", "a dog", ["a dog"] * 10) for i in range(90))
    paths = write_vqa(tmp_path, rows)
    first = {q.id: q.image for q in VqaSource(*paths, end=0.4).queries()}
    second = {q.id: q.image for q in VqaSource(*paths, begin=0.4).queries()}
    assert len(first) + len(second) == 90
    assert not set(first.values()) & set(second.values())


def _changed(path: str, key: str, index: int, **changes: Any) -> None:
    content = json.loads(Path(path).read_text())
    content[key][index].update(changes)
    Path(path).write_text(json.dumps(content))


def test_bad_questions_are_named_or_left_out(tmp_path: Path) -> None:
    rows = (
        *VQA_ROWS,
        (1, 1, "?", "other", "dog", ["dog"] * 10),
        (1, 1, "What?", "other", "dog", ["dog"] * 10),
    )
    questions, annotations, root = write_vqa(tmp_path, rows)
    _changed(questions, "questions", 0, question_id=99)
    _changed(questions, "questions", 1, image_id="x")
    _changed(questions, "questions", 2, image_id=7)
    with pytest.raises(DataError, match=f"{questions}:1: question 99 has no annotation in {annotations}"):
        VqaSource(questions, annotations, root).queries()
    source = VqaSource(questions, annotations, root, on_bad_record="skip")
    with pytest.warns(UserWarning, match="left out 4 of 5 records"):
        assert [q.question for q in source.queries()] == ["?"]
    for message, culprit in zip(
        source.bad.messages, ("question 99", "'image_id'", "COCO_val2014_000000000007", "'1'"), strict=True
    ):
        assert culprit in message


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"answer_type": "maybe"}, "'maybe'"),
        ({"answers": ["a"]}, "'answers'"),
        ({"question_type": None}, "question_type"),
        ({"question_id": "a"}, "'question_id'"),
    ],
)
def test_annotations_of_another_format_are_refused(
    tmp_path: Path, changes: dict[str, Any], culprit: str
) -> None:
    questions, annotations, root = write_vqa(tmp_path)
    _changed(annotations, "annotations", 1, **changes)
    with pytest.raises(DataError) as caught:
        VqaSource(questions, annotations, root).queries()
    assert str(caught.value).startswith(f"{annotations}:1: ")
    assert culprit in str(caught.value)


def test_files_that_are_swapped_are_refused(tmp_path: Path) -> None:
    questions, annotations, root = write_vqa(tmp_path)
    with pytest.raises(DataError, match=f"{questions}: no annotations"):
        VqaSource(annotations, questions, root).queries()
