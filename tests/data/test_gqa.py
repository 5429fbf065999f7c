"""GQA: key objects by the annotations of a question, distractors, and questions about absent objects and whole scenes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.data.sources.gqa import GqaSource
from vlm_calibration.records import DataError, Query

from .published import GQA_QUESTIONS, SCENE_GRAPHS, write_gqa


@pytest.fixture
def source(tmp_path: Path) -> GqaSource:
    source = GqaSource(*write_gqa(tmp_path))
    with pytest.warns(UserWarning, match="the box of 1 objects covers fewer than 9 pixels"):
        source.queries()
    return source


def _boxes(query: Query) -> dict[str, list[tuple[float, ...]]]:
    boxes: dict[str, list[tuple[float, ...]]] = {}
    for region in query.regions:
        boxes.setdefault(region.label, []).append(region.box)
    return boxes


def test_key_objects_and_distractors(source: GqaSource) -> None:
    query = source.queries()[0]
    assert (query.id, query.image, query.category) == ("1", "10.jpg", "query/rel")
    assert (query.answer, query.answer_type, query.synonyms) == ("plate", "short", ("The answer is plate.",))
    assert set(query.objects) == {"table", "plate"}
    assert _boxes(query)["table"] == [(0, 4, 10, 10)]
    assert len(_boxes(query)["chair"]) == 2
    loaded = source.load(query)
    assert len(loaded.evidence) == len(loaded.distractors) == 2
    assert loaded.evidence[0][4:10, 0:10].all()
    assert source.presence(query) == "present"


def test_another_object_of_the_same_name_is_no_region(source: GqaSource) -> None:
    query = source.queries()[2]
    assert query.objects == ("chair",)
    assert _boxes(query)["chair"] == [(12, 0, 16, 4)]
    assert set(_boxes(query)) == {"chair", "table", "plate"}


def test_absent_objects_and_whole_scenes(source: GqaSource) -> None:
    absent, scene = source.queries()[1], source.queries()[3]
    assert (absent.objects, absent.answer_type) == (("dog",), "yes_no")
    assert source.presence(absent) == "absent"
    assert set(_boxes(absent)) == {"table", "plate", "chair"}
    assert (scene.objects, scene.regions) == ((), ())
    assert source.presence(scene) == "unlocated"


def test_several_objects_of_one_phrase(source: GqaSource) -> None:
    query = source.queries()[4]
    assert set(query.objects) == {"cat", "cow"}
    assert len(source.load(query).evidence) == 2
    assert source.presence(query) == "present"


def test_wrong_answers_are_names_only_where_an_object_is_asked(source: GqaSource) -> None:
    about_object, about_colour = source.queries()[0], source.queries()[2]
    assert source.wrong_answers(about_object) == ["chair"]
    assert source.wrong_answers(about_colour) == []
    assert list(source.wrong_answers(source.queries()[1])) == ["Yes"]


def test_workers_get_the_same(source: GqaSource) -> None:
    assert list(pickle.loads(pickle.dumps(source)).queries()) == list(source.queries())


def test_without_scene_graphs_phrases_are_known(tmp_path: Path) -> None:
    questions, root, _ = write_gqa(tmp_path)
    queries = GqaSource(questions, root).queries()
    assert set(queries[0].objects) == {"table", "plate"}
    assert [q.objects for q in queries[1:]] == [("dog",), ("chair",), (), ("animal",)]
    assert not any(q.regions for q in queries)


def test_a_folder_of_questions(tmp_path: Path) -> None:
    _, root, _ = write_gqa(tmp_path)
    folder = tmp_path / "all"
    folder.mkdir()
    with pytest.raises(DataError, match=f"{folder}"):
        GqaSource(str(folder), root).queries()
    for name, keys in (("1.json", "12"), ("0.json", "345")):
        (folder / name).write_text(json.dumps({key: GQA_QUESTIONS[key] for key in keys}))
    assert [q.id for q in GqaSource(str(folder), root).queries()] == ["3", "4", "5", "1", "2"]


def test_shares_have_no_image_in_common(tmp_path: Path) -> None:
    rows = {str(i): {**GQA_QUESTIONS["2"], "imageId": str(i // 3)} for i in range(60)}
    questions, root, _ = write_gqa(tmp_path, rows)
    parts = [
        {q.image for q in GqaSource(questions, root, begin=b, end=e).queries()}
        for b, e in ((0, 0.5), (0.5, 1))
    ]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 20


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"answer": None}, "'answer'"),
        ({"imageId": 3}, "'imageId'"),
        ({"imageId": "13"}, "13.jpg"),
        ({"question": ""}, "'question'"),
        ({"answer": "?!"}, "question '2'"),
    ],
)
def test_bad_questions_are_named_or_left_out(tmp_path: Path, changes: dict[str, Any], culprit: str) -> None:
    questions, root, graphs = write_gqa(tmp_path)
    rows = {**GQA_QUESTIONS, "2": {**GQA_QUESTIONS["2"], **changes}}
    Path(questions).write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        GqaSource(questions, root, graphs).queries()
    assert str(caught.value).startswith(f"{questions}:1: ")
    assert culprit in str(caught.value)
    source = GqaSource(questions, root, on_bad_record="skip")
    with pytest.warns(UserWarning, match="left out 1 of 5 records"):
        assert [q.id for q in source.queries()] == ["1", "3", "4", "5"]


@pytest.mark.parametrize(
    ("graphs", "culprit"),
    [
        ({"99": SCENE_GRAPHS["10"]}, "none of the 2 images"),
        ({"10": []}, "'objects'"),
        ({"10": {"objects": {"101": {"name": "chair"}}}}, "'101'"),
        ([], "an object"),
    ],
)
def test_scene_graphs_of_another_split_or_format_are_refused(
    tmp_path: Path, graphs: Any, culprit: str
) -> None:
    questions, root, path = write_gqa(tmp_path, graphs=graphs)
    with pytest.raises(DataError) as caught:
        GqaSource(questions, root, path).queries()
    assert str(caught.value).startswith(path)
    assert culprit in str(caught.value)
