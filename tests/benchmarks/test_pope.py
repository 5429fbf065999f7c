"""POPE's files and rule, compared with an independent implementation and with cases computed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_calibration.benchmarks import pope
from vlm_calibration.records import DataError, Query

from ..data.conftest import refused
from . import official_rules

ODD = (
    *("Yes", "No", "yes", "no", "NO", "Yes.", "No.", "Yes, there is.", "No, there is not.", "It is not. Yes"),
    *("", " ", ".", ". No", "\nNo", "No\n", "Not sure", "not", "cannot", "no,", "No,no"),
    *("Nope", "None", "No dog"),
    *("Yes\nno\nYes", "Yes.\nNo.", "I see no dog, sorry", "There isn't", "{}", "null", "无"),
    *("no\u00a0dog", "no\tdog"),
    *("Ｎｏ", "No;", "\u2028No", "Yes and no.", "No. Yes.", "a.b.no", " no", "no ", "maybe"),
    *("<pad>", "Dr. No"),
)
TOKENS = st.sampled_from(["No", "no", "not", "Yes", "yes", " ", " ", ",", ".", "\n", "dog", "NO", "\t", "an"])
TEXTS = st.lists(TOKENS, max_size=8).map("".join) | st.sampled_from(ODD)
LABELS = st.sampled_from(["yes", "no"])


def _queries(labels: list[str]) -> list[Query]:
    return [Query(str(i), "", "", label.capitalize(), "yes_no") for i, label in enumerate(labels)]


def _ours(labels: list[str], texts: list[str]) -> dict[str, float]:
    return pope.PopeCounts.of(_queries(labels), texts).scores()


@settings(max_examples=50)
@given(
    st.lists(st.tuples(LABELS, TEXTS | st.just("Confidence: 0.9. No") | st.text()), min_size=1, max_size=30)
)
def test_scores_are_those_of_the_script_on_the_written_files(answered: list[tuple[str, str]]) -> None:
    labels, texts = map(list, zip(*answered, strict=True))
    queries = _queries(labels)
    lines = [json.dumps(row) for row in pope.official_answers(queries, [(text, None) for text in texts])]
    truths = [json.dumps(row) for row in pope.official_labels(queries)]
    assert not any("\n" in line or not line.isascii() for line in lines)
    ours = _ours(labels, texts)
    try:
        theirs = official_rules.pope([json.loads(x) for x in truths], [json.loads(x) for x in lines])
    except ZeroDivisionError:
        assert any(math.isnan(value) for value in ours.values())
    else:
        assert ours == theirs, "to the last bit"


@pytest.mark.parametrize(
    ("labels", "texts", "expected"),
    [
        # Two true and one false yes, one true and one false no.
        ("yynny", ["Yes", "Yes, a dog.", "Sure", "No", "no"], (3 / 5, 2 / 3, 2 / 3, 2 / 3, 3 / 5)),
        # No answer is yes: no precision.
        ("yn", ["no", "no"], (1 / 2, math.nan, 0, math.nan, 0)),
        # No label is yes, as in the edited half of POPEv2: no recall.
        ("nn", ["Yes", "no"], (1 / 2, 0, math.nan, math.nan, 1 / 2)),
        # All wrong: precision and recall are 0, F1 is 0 / 0.
        ("yn", ["No", "Yes"], (0, 0, 0, math.nan, 1 / 2)),
    ],
)
def test_by_hand(labels: str, texts: list[str], expected: tuple[float, ...]) -> None:
    named = dict(zip(("accuracy", "precision", "recall", "f1", "yes_ratio"), expected, strict=True))
    scores = _ours([{"y": "yes", "n": "no"}[label] for label in labels], texts)
    assert scores == pytest.approx(named, abs=0, rel=1e-15, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "no"),
    [
        ("Confidence: 0.9. No", True),
        ("Confidence: 0.9. Yes", False),
        ("No\nConfidence: 80%", True),
        ("No. Confidence: 80%", True),
        ("Yes. Confidence: 100%", False),
        ("Yes. I am not 100% sure", False),
        ('{"answer": "no", "confidence": 0.9}', True),
        ("I am 80% sure. No", True),
        # Without a stated confidence the answer is unchanged, including a blank that hides it from the script.
        ("\nNo", False),
        ("No\n", False),
        ("Sure. No", False),
    ],
)
def test_the_stated_confidence_is_not_part_of_the_answer(text: str, no: bool) -> None:
    assert (pope.PopeCounts.of(_queries(["no"]), [text]).answers[None, "No", "No"] == 1) is no


POPE = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there an apple in the image?", "label": "no"},
]
V2 = {"image_id": 7, "target_object": "dog", "query": "Is there a dog in the image?"}
POPE_V2 = [
    {**V2, "image_name": f"{folder}/7.jpg", "label": label}
    for folder, label in (("/images", "No"), ("/coco/train2017", "Yes"))
]


Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    def write(name: str, rows: Any, lines: bool = True) -> Path:
        path = tmp_path / name
        text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows, indent=4)
        path.write_text(rows if isinstance(rows, str) else text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("lines", [True, False], ids=["COCO", "A-OKVQA and GQA"])
def test_official_questions(written: Written, lines: bool) -> None:
    queries, numbered = pope.read_questions(written("labels.json", POPE, lines))
    assert numbered
    assert [(q.id, q.image, q.answer) for q in queries] == [("1", "a.jpg", "Yes"), ("2", "a.jpg", "No")]
    assert [q.objects for q in queries] == [("dog",), ("apple",)]


def test_annotations_of_popev2(written: Written) -> None:
    queries, numbered = pope.read_questions(written("annotations.json", POPE_V2, False))
    assert not numbered
    assert [(q.id, q.image) for q in queries] == [("1", "images/7.jpg"), ("2", "coco/train2017/7.jpg")]
    labels = [row["label"] for row in pope.official_labels(queries)]
    assert labels == ["no", "yes"], "as the script spells it"


@pytest.mark.parametrize("numbered", [True, False])
def test_answers_are_matched_by_id_or_in_order(written: Written, numbered: bool) -> None:
    labels = written("labels.json", POPE)
    rows = [{"question": x["text"].lower() + " Yes or no?", "answer": x["label"]} for x in POPE]
    if numbered:
        rows = [{"question_id": x["question_id"], **row} for x, row in zip(POPE, rows, strict=True)][::-1]
    _, replies = pope.read_answers(written("answers.jsonl", rows), labels)
    assert [given.text for given in replies] == ["yes", "no"]


@pytest.mark.parametrize("first", [0, 1])
def test_answers_to_questions_without_ids_keep_their_order(written: Written, first: int) -> None:
    labels = written("annotations.json", POPE_V2, False)
    rows = [{"question_id": first + i, "answer": x} for i, x in enumerate(("no", "yes"))]
    assert [a.text for a in pope.read_answers(written("a.jsonl", rows), labels)[1]] == ["no", "yes"]
    with pytest.raises(DataError, match=r"r.jsonl:[12]: .*annotations.json has no ids.*expected"):
        pope.read_answers(written("r.jsonl", rows[::-1]), labels)


@pytest.mark.parametrize(
    ("record", "confidence"),
    [
        ({"answer": "Yes", "confidence": 0.25}, 0.25),
        ({"answer": "Yes. Confidence: 80%", "confidence": 1}, 1.0),
        ({"answer": "Yes. Confidence: 80%", "confidence": None}, None),
        ({"answer": "Yes. Confidence: 80%"}, 0.8),
        ({"answer": "Yes"}, None),
    ],
)
def test_a_confidence_of_its_own_comes_first(written: Written, record: Any, confidence: float | None) -> None:
    labels = written("labels.json", POPE[:1])
    _, [answer] = pope.read_answers(written("a.jsonl", [record]), labels)
    assert answer.confidence == confidence


ANSWERS = [{"question_id": i, "answer": "yes"} for i in (1, 2)]


@pytest.mark.parametrize(
    ("labels", "answers", "says"),
    [
        (POPE, "", "a.jsonl: no record in this file"),
        (POPE, "{}\n[1", "a.jsonl:2: not JSON"),
        (POPE, '{"question_id": 1, "answer": "yes"}\n3\n', "a.jsonl:2: expected a JSON object, found int"),
        (POPE, '[{"question_id": 1, "answer": "yes"}, null]', "a.jsonl: record 2: expected a JSON object"),
        (POPE, ANSWERS[:1], "a.jsonl: no answer to 1 of the 2 questions in {labels}: '2'"),
        (POPE, [*ANSWERS, ANSWERS[0]], "a.jsonl:3: a second answer to 1, the first is at {answers}:1"),
        (POPE, [*ANSWERS, {"question_id": 9, "answer": ""}], "a.jsonl:3: 9 is no id in {labels}"),
        (POPE, [*ANSWERS, {"answer": ""}], "a.jsonl:3: no 'question_id'"),
        (
            POPE,
            [{"question_id": 1.5, "answer": ""}],
            "a.jsonl:1: 'question_id' must be a string or a whole number",
        ),
        (POPE, [{"question_id": 1, "text": "x"}], "a.jsonl:1: 'answer' must be a string, found no such key"),
        (POPE, [{"question_id": 1, "answer": None}], "a.jsonl:1: 'answer' must be a string, found None"),
        (POPE, [{**ANSWERS[0], "confidence": "80%"}], "a.jsonl:1: 'confidence' must be a number in [0, 1]"),
        (POPE, [{**ANSWERS[0], "confidence": 80}], "a.jsonl:1: 'confidence' must be a number in [0, 1]"),
        (POPE, [{"answer": "yes"}], "a.jsonl: 1 answers to the 2 questions in {labels}"),
        (POPE, [{"answer": "", "question": "A cat?"}] * 2, "a.jsonl:1: answers are matched in order"),
        ([{**POPE[0], "label": "maybe"}], ANSWERS, "l.json:1: 'label' must be yes or no, found 'maybe'"),
        ([{"question_id": 1}], ANSWERS, "l.json:1: 'label' must be a string, found no such key"),
        ([POPE[0], POPE[0]], ANSWERS, "l.json:2: duplicate question_id 1, first at {labels}:1"),
    ],
)
def test_a_mistake_is_named(written: Written, labels: Any, answers: Any, says: str) -> None:
    paths = {"labels": written("l.json", labels), "answers": written("a.jsonl", answers)}
    with refused(f"{paths['labels'].parent}/{says.format(**paths)}"):
        pope.read_answers(paths["answers"], paths["labels"])
