"""AMBER's files and rules, compared with an independent implementation and with cases computed by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.benchmarks import amber
from vlm_calibration.benchmarks.amber import CATEGORIES, DIMENSIONS, AmberCounts, read_answers, read_queries
from vlm_calibration.records import DataError, Query

from ..data.conftest import refused
from . import official_rules
from .test_pope import Written
from .test_pope import written as written

TYPES = tuple(CATEGORIES)
ODD = (
    *("Yes", "No", "yes", "no", "YES", "NO", "Yes.", "No.", " No", "No ", "No\n", "\nYes", "", "Yes, it is."),
    *("There is no dog.", "Yes\nNo", "Yes Yes", "Ｎｏ", "null", "Maybe", "0"),
    *("No, no", "Y", "N", "<s>No</s>"),
)
Rows = list[dict[str, Any]]


def _file(rows: list[tuple[str, str, str]]) -> tuple[Rows, Rows]:
    """Annotations and answers of (type, truth, response)."""
    numbered = list(enumerate(rows, start=1))
    annotations = [{"id": i, "type": kind, "truth": truth} for i, (kind, truth, _) in numbered]
    return annotations, [{"id": i, "response": text} for i, (_, _, text) in numbered]


def _queries(annotations: Rows) -> list[Query]:
    return [
        Query(str(a["id"]), "", "", a["truth"].capitalize(), "yes_no", category=CATEGORIES[a["type"]])
        for a in annotations
    ]


def test_scores_of_answer_files_are_those_of_the_script(tmp_path: Path) -> None:
    """Also on the file that is written for it, without stated confidences."""
    rng = random.Random(0)
    for size in (*(rng.randint(1, 12) for _ in range(50)), 5_000):
        skill = rng.random()
        rows = []
        for _ in range(size):
            kind, truth = rng.choice(TYPES), rng.choice(("yes", "no"))
            rows.append((kind, truth, truth.capitalize() if rng.random() < skill else rng.choice(ODD)))
        annotations, answers = _file(rows)
        for name, content in (("annotations.json", annotations), ("answers.json", answers[::-1])):
            (tmp_path / name).write_text(json.dumps(content))
        queries, replies, *_ = read_answers(tmp_path / "answers.json", tmp_path / "annotations.json")
        counts = AmberCounts.of(queries, [reply.text for reply in replies])
        assert counts.scores(DIMENSIONS) == official_rules.amber(annotations, answers)
        parts = [AmberCounts.of(queries[p], [r.text for r in replies[p]]) for p in (slice(3), slice(3, None))]
        assert (parts[0] + parts[1]).scores() == counts.scores(), "counts add up"
        stated = [(f"{reply.text}. Confidence: 80%", 0.8) for reply in replies]
        written = json.loads(json.dumps(amber.official_answers(queries, stated)))
        of_stated = AmberCounts.of(queries, [text for text, _ in stated])
        assert of_stated.scores(DIMENSIONS) == official_rules.amber(annotations, written)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        # Every denominator has 0.001 too many: 1 / 3.001, 1 / 2.001, 1 / 2.001.
        ("state/", (33.3, 50.0, 50.0, 50.0)),
        # "No." is wrong, and counts: 1 / 2.001, 0 / 0.001, 0 / 1.001.
        ("number/", (50.0, 0.0, 0.0, 0.0)),
        # 1 / 1.001 is 99.9 percent, and F1 = 2 * 0.999 ** 2 / (2 * 0.999 + 0.001) is 99.85003 percent.
        ("existence/", (99.9, 99.9, 99.9, 99.9)),
        # The attributes' denominators are sums of three: 2 / 5.003, 1 / 2.003, 1 / 3.003.
        ("attribute/", (40.0, 49.9, 33.3, 39.9)),
        ("", (50.0, 66.6, 50.0, 57.1)),
        # No answer is 0 / 0.001.
        ("relation/", (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_by_hand(block: str, expected: tuple[float, ...]) -> None:
    existence, state, number = TYPES[:3]
    rows = [(state, "no", "No"), (state, "no", "Yes"), (state, "yes", "No")]
    rows += [(number, "yes", "Yes"), (number, "no", "No."), (existence, "no", "No")]
    annotations, answers = _file(rows)
    scores = AmberCounts.of(_queries(annotations), [a["response"] for a in answers]).scores(DIMENSIONS)
    assert tuple(scores[block + key] for key in ("accuracy", "precision", "recall", "f1")) == expected


def test_blocks_are_those_of_the_dimensions() -> None:
    annotations, answers = _file([(TYPES[0], "no", "No"), (TYPES[1], "yes", "Yes")])
    counts = AmberCounts.of(_queries(annotations), [a["response"] for a in answers])
    blocks = {name.rpartition("/")[0] for name in counts.scores()}
    assert blocks == {"existence", "attribute", "state", "number", "action"}, "nothing is about relations"
    expected = official_rules.amber(annotations, answers)
    assert counts.scores(["existence"]) == {k: v for k, v in expected.items() if k.startswith("existence/")}
    assert set(counts.scores(DIMENSIONS)) == set(expected)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("No. Confidence: 80%", True),
        ("No, 80%", True),
        ("no. Confidence: 80%", False),
        ("No!  Confidence: 80%", False),
        # Without a stated confidence the answer is unchanged.
        ("No.", False),
        ("No ", False),
    ],
)
def test_the_stated_confidence_is_not_part_of_the_answer(text: str, right: bool) -> None:
    counts = AmberCounts.of(_queries([{"id": 1, "type": "relation", "truth": "no"}]), [text])
    assert (counts.answers["relation", "No", "No"] == 1) is right


GENERATIVE = {"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["sun"]}
NEGATIVE: Rows = [{"id": i, "type": kind, "truth": "no"} for i, kind in enumerate(TYPES, start=2)]
ANNOTATIONS: Rows = [GENERATIVE, *NEGATIVE]
ANSWERS = [{"id": a["id"], "response": "No"} for a in NEGATIVE]


def test_official_files(written: Written) -> None:
    annotations = written("annotations.json", ANNOTATIONS, False)
    path = written("answers.json", [{"id": 1, "response": "A sky."}, *ANSWERS[::-1]], False)
    queries, replies, generative, others = read_answers(path, annotations)
    assert [q.category for q in queries] == list(CATEGORIES.values())
    assert [r.id for r in replies] == [q.id for q in queries] == ["2", "3", "4", "5", "6", "7"]
    assert (generative, others) == (1, 0)
    _, replies, generative, others = read_answers(path, annotations, ["existence"])
    assert [r.id for r in replies] == ["2"]
    assert (generative, others) == (1, 5)
    rows = [{"id": i, "image": f"AMBER_{i}.jpg", "query": "Is it?"} for i in (1, 2)]
    [query], generative = read_queries(written("query_all.json", rows, False), annotations)
    assert (query.id, query.image, query.answer, query.category) == ("2", "AMBER_2.jpg", "No", "existence")
    assert generative == 1
    for wrong, says in (([*rows, rows[1]], "duplicate id 2"), ([*rows, {"id": 99}], "99 is no id in")):
        with pytest.raises(DataError, match=f"q.json: record 3: {says}"):
            read_queries(written("q.json", wrong, False), annotations)


@pytest.mark.parametrize(
    ("annotations", "answers", "says"),
    [
        (
            ANNOTATIONS,
            ANSWERS[:-2],
            "a.json: no answer to 2 of the 6 questions in {annotations}: '6', '7'; none is about relation: `--only` scores",
        ),
        (ANNOTATIONS, [{"id": "2", "response": "No"}], "a.json: record 1: 'id' must be a whole number"),
        (ANNOTATIONS, [{"id": 2, "answer": "No"}], "a.json: record 1: 'response' must be a string"),
        ([{**ANNOTATIONS[1], "truth": "maybe"}], ANSWERS, "t.json: record 1: 'truth' must be yes or no"),
        ([{**ANNOTATIONS[1], "type": "odd"}], ANSWERS, "t.json: record 1: 'type' must be one of generative"),
        ([ANNOTATIONS[1]] * 2, ANSWERS, "t.json: record 2: duplicate id 2"),
        ([GENERATIVE], ANSWERS, "t.json: no question about existence or attribute or relation"),
    ],
)
def test_a_mistake_is_named(written: Written, annotations: Any, answers: Any, says: str) -> None:
    files = {"annotations": ("t.json", annotations), "answers": ("a.json", answers)}
    paths = {name: written(*file, lines=False) for name, file in files.items()}
    with refused(f"{paths['answers'].parent}/{says.format(**paths)}"):
        read_answers(paths["answers"], paths["annotations"])
