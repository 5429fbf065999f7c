"""AMBER's files and rules, compared with an independent implementation and with cases computed by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_calibration.benchmarks import amber
from vlm_calibration.records import DataError

from . import official_rules

TYPES = tuple(amber.CATEGORIES)
ODD = (
    *("Yes", "No", "yes", "no", "YES", "NO", "Yes.", "No.", " No", "No ", "No\n", "\nYes", ""),
    "Yes, there is.",
    *("There is no dog.", "Yes\nNo", "Yes Yes", "Ｎｏ", "null", "Maybe", "0", "No, no", "Y", "N"),
    "<s>No</s>",
)


def _scores(annotations: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, float]:
    """Our counts, from decoded JSON without files."""
    truths = [
        amber.AmberTruth(
            a["id"], amber.CATEGORIES[annotations[a["id"] - 1]["type"]], annotations[a["id"] - 1]["truth"]
        )
        for a in answers
    ]
    counts = amber.count_answers(truths, [a["response"] for a in answers])
    return counts.scores(list(amber.DIMENSIONS))


def _file(rows: list[tuple[str, str, str]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    annotations = [
        {"id": i, "type": kind, "truth": truth} for i, (kind, truth, _) in enumerate(rows, start=1)
    ]
    return annotations, [{"id": i, "response": text} for i, (_, _, text) in enumerate(rows, start=1)]


@pytest.mark.slow
@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from(TYPES), st.sampled_from(["yes", "no"]), st.sampled_from(ODD)),
        max_size=60,
    )
)
def test_scores_are_those_of_the_script(rows: list[tuple[str, str, str]]) -> None:
    annotations, answers = _file(rows)
    assert _scores(annotations, answers) == official_rules.amber(annotations, answers)


@pytest.mark.slow
def test_hundreds_of_answer_files(tmp_path: Path) -> None:
    rng = random.Random(0)
    for size in (*(rng.randint(1, 12) for _ in range(200)), 14_216):
        skill = rng.random()
        rows = []
        for _ in range(size):
            kind, truth = rng.choice(TYPES), rng.choice(("yes", "no"))
            right = "Yes" if truth == "yes" else "No"
            rows.append((kind, truth, right if rng.random() < skill else rng.choice(ODD)))
        annotations, answers = _file(rows)
        for name, content in (("annotations.json", annotations), ("answers.json", answers[::-1])):
            (tmp_path / name).write_text(json.dumps(content))
        read = amber.read_answers(
            tmp_path / "answers.json", amber.read_annotations(tmp_path / "annotations.json")
        )
        counts = amber.count_answers(read.truths, [reply.text for reply in read.replies])
        assert counts.scores(amber.DIMENSIONS) == official_rules.amber(annotations, answers)


def test_by_hand() -> None:
    state, number, existence = TYPES[1], TYPES[2], TYPES[0]
    annotations, answers = _file(
        [
            (state, "no", "No"),
            (state, "no", "Yes"),
            (state, "yes", "No"),
            (number, "yes", "Yes"),
            (number, "no", "No."),
            (existence, "no", "No"),
        ]
    )
    scores = _scores(annotations, answers)
    # Every denominator has 0.001 too many: 1 / 3.001, 1 / 2.001, 1 / 2.001.
    assert {k: scores[f"state/{k}"] for k in amber.SCORES} == {
        "accuracy": 33.3,
        "precision": 50.0,
        "recall": 50.0,
        "f1": 50.0,
    }
    # "No." is wrong, and counts: 1 / 2.001, 0 / 0.001, 0 / 1.001.
    assert {k: scores[f"number/{k}"] for k in amber.SCORES} == {
        "accuracy": 50.0,
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
    }
    # 1 / 1.001 is 99.9 percent, and F1 = 2 * 0.999 ** 2 / (2 * 0.999 + 0.001) is 99.85003 percent.
    assert {k: scores[f"existence/{k}"] for k in amber.SCORES} == {
        "accuracy": 99.9,
        "precision": 99.9,
        "recall": 99.9,
        "f1": 99.9,
    }
    # The attributes' denominators are sums of three: 2 / 5.003, 1 / 2.003, 1 / 3.003.
    assert {k: scores[f"attribute/{k}"] for k in amber.SCORES} == {
        "accuracy": 40.0,
        "precision": 49.9,
        "recall": 33.3,
        "f1": 39.9,
    }
    assert {k: scores[k] for k in amber.SCORES} == {
        "accuracy": 50.0,
        "precision": 66.6,
        "recall": 50.0,
        "f1": 57.1,
    }
    assert {scores[f"relation/{k}"] for k in amber.SCORES} == {0.0}, "no answer is 0 / 0.001"


def test_blocks_are_those_of_the_dimensions() -> None:
    annotations, answers = _file([(TYPES[0], "no", "No"), (TYPES[1], "yes", "Yes")])
    truths = [amber.AmberTruth(1, "existence", "no"), amber.AmberTruth(2, "attribute/state", "yes")]
    counts = amber.count_answers(truths, [a["response"] for a in answers])
    blocks = {name.rpartition("/")[0] for name in counts.scores()}
    assert blocks == {"existence", "attribute", "state", "number", "action"}, "nothing is about relations"
    expected = official_rules.amber(annotations, answers)
    assert counts.scores(["existence"]) == {k: v for k, v in expected.items() if k.startswith("existence/")}
    assert set(counts.scores(amber.DIMENSIONS)) == set(expected)


def test_counts_add_up() -> None:
    rng = random.Random(1)
    truths = [
        amber.AmberTruth(i, rng.choice(list(amber.CATEGORIES.values())), rng.choice(("yes", "no")))
        for i in range(60)
    ]
    texts = [rng.choice(ODD) for _ in truths]
    parts = [amber.count_answers(truths[part], texts[part]) for part in (slice(25), slice(25, 60))]
    assert (parts[0] + parts[1]).scores() == amber.count_answers(truths, texts).scores()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("No. Confidence: 80%", True),
        ("No Confidence: 80%", True),
        ("Confidence: 0.9. No", True),
        ("No, 80%", True),
        ('{"answer": "No", "confidence": 0.9}', True),
        ("no. Confidence: 80%", False),
        ("No!  Confidence: 80%", False),
        ("No, it is not. Confidence: 80%", False),
        # Without a stated confidence the answer is unchanged.
        ("No.", False),
        ("No ", False),
    ],
)
def test_the_stated_confidence_is_not_part_of_the_answer(text: str, right: bool) -> None:
    counts = amber.count_answers([amber.AmberTruth(1, "relation", "no")], [text])
    assert (counts.answers["relation", "no", "No"] == 1) is right


GENERATIVE = {"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["sun"]}
ANNOTATIONS = [
    GENERATIVE,
    *({"id": i, "type": kind, "truth": "no"} for i, kind in enumerate(TYPES, start=2)),
]
ANSWERS = [{"id": a["id"], "response": "No"} for a in ANNOTATIONS[1:]]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1), encoding="utf-8")
        return path

    return write


def test_official_files(written: Callable[..., Path]) -> None:
    annotations = amber.read_annotations(written("annotations.json", ANNOTATIONS))
    assert annotations.generative == {1}
    assert [t.category for t in annotations.truths.values()] == list(amber.CATEGORIES.values())
    answers = [{"id": 1, "response": "A sky."}, *ANSWERS[::-1]]
    read = amber.read_answers(written("answers.json", answers), annotations)
    assert [r.id for r in read.replies] == [str(t.id) for t in read.truths] == ["2", "3", "4", "5", "6", "7"]
    assert (read.generative, read.others) == (1, 0)
    read = amber.read_answers(written("answers.json", answers), annotations, ["existence"])
    assert [r.id for r in read.replies] == ["2"]
    assert (read.generative, read.others) == (1, 5)
    queries = [{"id": i, "image": f"AMBER_{i}.jpg", "query": "Is it?"} for i in (1, 2)]
    questions = amber.read_queries(written("query_all.json", queries))
    query = annotations.truths[2].query(questions[1])
    assert (query.id, query.image, query.answer, query.category) == ("2", "AMBER_2.jpg", "No", "existence")


@pytest.mark.parametrize(
    ("annotations", "answers", "says"),
    [
        (ANNOTATIONS, ANSWERS[:-1], "a.json: no answer to 1 of the 6 questions in {annotations}: '7'"),
        (
            ANNOTATIONS,
            ANSWERS[:-2],
            "a.json: no answer to 2 of the 6 questions in {annotations}: '6', '7'; none is about relation: `--only` scores",
        ),
        (
            ANNOTATIONS,
            [*ANSWERS, ANSWERS[0]],
            "a.json: record 7: a second answer to 2, the first is at {answers}: record 1",
        ),
        (
            ANNOTATIONS,
            [*ANSWERS, {"id": 99, "response": "No"}],
            "a.json: record 7: 99 is no id in {annotations}",
        ),
        (
            ANNOTATIONS,
            [{"id": "2", "response": "No"}],
            "a.json: record 1: 'id' must be a whole number, found '2'",
        ),
        (
            ANNOTATIONS,
            [{"id": 2, "answer": "No"}],
            "a.json: record 1: 'response' must be a string, found no such key",
        ),
        (
            ANNOTATIONS,
            [{**ANSWERS[0], "confidence": -0.1}],
            "a.json: record 1: 'confidence' must be a number in [0, 1]",
        ),
        (ANNOTATIONS, '[{"id": 2,\n "response": No}]', "a.json:2: not JSON"),
        (
            [{**ANNOTATIONS[1], "truth": "maybe"}],
            ANSWERS,
            "t.json: record 1: 'truth' must be yes or no, found 'maybe'",
        ),
        (
            [{**ANNOTATIONS[1], "type": "odd"}],
            ANSWERS,
            "t.json: record 1: 'type' must be one of generative, ",
        ),
        ([ANNOTATIONS[1]] * 2, ANSWERS, "t.json: record 2: duplicate id 2"),
        ([GENERATIVE], ANSWERS, "t.json: no question about existence or attribute or relation"),
    ],
)
def test_a_mistake_is_named(written: Callable[..., Path], annotations: Any, answers: Any, says: str) -> None:
    paths = {"annotations": written("t.json", annotations), "answers": written("a.json", answers)}
    with pytest.raises(DataError) as caught:
        amber.read_answers(paths["answers"], amber.read_annotations(paths["annotations"]))
    assert str(caught.value).startswith(f"{paths['answers'].parent}/{says.format(**paths)}")
    assert "\n" not in str(caught.value)


def test_queries_with_one_id_twice(written: Callable[..., Path]) -> None:
    row = {"id": 2, "image": "a.jpg", "query": "Is it?"}
    with pytest.raises(DataError, match=r"q.json: record 2: duplicate id 2, first at .*q.json: record 1"):
        amber.read_queries(written("q.json", [row, row]))


@pytest.mark.slow
@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(TYPES),
            st.sampled_from(["yes", "no"]),
            st.sampled_from([*ODD, "No. Confidence: 80%", "Confidence: 0.9. Yes"]) | st.text(),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_what_is_written_for_the_script_scores_the_same_there(rows: list[tuple[str, str, str]]) -> None:
    annotations, answers = _file(rows)
    truths = [amber.AmberTruth(a["id"], amber.CATEGORIES[a["type"]], a["truth"]) for a in annotations]
    texts = [(a["response"], 0.5) for a in answers]
    written = json.loads(json.dumps(amber.official_answers(truths, texts)))
    assert official_rules.amber(annotations, written) == _scores(annotations, answers)
