"""GQA (Hudson and Manning, arXiv 1902.09506): its questions, and the boxes of its scene graphs as regions.

The objects for which the words of a question and its answer stand are the key objects; those of other names are distractors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlm_calibration.data.convert.reading import Source, explained, json_members
from vlm_calibration.records import MIN_BOX, DataError, RecordError
from vlm_calibration.text.conventions import infer_answer_type
from vlm_calibration.text.matching import match_key

_ARGUMENT = re.compile(r"(?P<name>[^,()]*)[^()]*\((?P<ids>[-\d,\s]*)\)\s*")
"""The argument of an operation that finds an object: "horse,on the edge of,s (447018)", or "dog (-)" for one that is absent."""

Objects = Sequence[tuple[int, str, list[int]]]
"""The id, name and box of each object of an image."""


def gqa(questions: Path, *, scene_graphs: Path | None = None) -> Source:
    """Convert GQA: its questions and, as regions, the boxes of its scene graphs.

    Categories are "STRUCTURAL TYPE/SEMANTIC TYPE", such as "query/attr". Objects of fewer than 9 pixels are left out.

    Args:
        questions: e.g. train_balanced_questions.json, or the folder train_all_questions
        scene_graphs: e.g. train_sceneGraphs.json; without it key objects are named, but have no regions
    """
    graphs: dict[str, Objects] = {}
    if scene_graphs is not None:
        for image, graph in json_members(scene_graphs):
            with explained(f"{scene_graphs}: {image!r}"):
                graphs[image] = [
                    (int(key), o["name"], [o["x"], o["y"], o["x"] + o["w"], o["y"] + o["h"]])
                    for key, o in graph["objects"].items()
                    if min(o["w"], o["h"]) > 0 and o["w"] * o["h"] >= MIN_BOX
                ]
    files = sorted(questions.glob("*.json")) if questions.is_dir() else [questions]
    if not files:
        raise DataError(f"{questions}: no *.json file in this folder")
    has_graph = scene_graphs is None
    for file in files:
        for key, question in json_members(file):
            has_graph |= isinstance(question, Mapping) and str(question.get("imageId")) in graphs
            yield f"{file}: {key!r}", partial(_query, key, question, graphs)
    if not has_graph:
        raise DataError(f"{scene_graphs}: none of the images: use the file of the questions' split")


def _query(key: str, value: Mapping[str, Any], graphs: Mapping[str, Objects]) -> list[dict[str, Any]]:
    answer, image = value.get("answer"), value["imageId"]
    if not isinstance(answer, str):
        raise RecordError(f"'answer' must be a text, found {answer!r}; the test split has none")
    ids, names, absent = _key_objects(value, answer)
    objects = graphs.get(image, ())
    located = list(dict.fromkeys(name for number, name, _ in objects if number in ids))
    phrases = list(dict.fromkeys((*names, *absent)))
    # Another chair is neither evidence about this chair nor a part of the image that the question is not about.
    taken = {match_key(name) for name in (*phrases, *located)}
    shown = [o for o in objects if o[0] in ids or match_key(o[1]) not in taken]
    regions = [{"label": name, "box": box} for _, name, box in shown]
    # The scene graph's own names once it has every key object: "animal" is a cat and a cow.
    is_located = bool(ids) and sum(number in ids for number, *_ in objects) == len(ids)
    structural, semantic = ((value.get("types") or {}).get(kind) for kind in ("structural", "semantic"))
    is_yes_no, full = infer_answer_type(answer) == "yes_no", value.get("fullAnswer")
    # Only to questions whose answer is an object's name are other objects' names plausible answers.
    names_object = is_yes_no or semantic in ("obj", "cat", "rel")
    return [
        {
            "id": key,
            "image": f"{image}.jpg",
            "question": value["question"],
            "answer": answer,
            "answer_type": "yes_no" if is_yes_no else "short",
            "objects": located if is_located else list(dict.fromkeys((*phrases, *located))),
            # A question about the scene as a whole names no object, so no region shows what it is about.
            "regions": regions if phrases or located else [],
            "category": "/".join(filter(None, (structural, semantic))) or None,
            "synonyms": [full] if full and not is_yes_no else [],
            "absent": absent,
            "wrong_answers": None if names_object else [],
        }
    ]


def _key_objects(value: Mapping[str, Any], answer: str) -> tuple[set[int], list[str], list[str]]:
    """The ids and names of the objects that a question and its answer are about, and the names of absent ones."""
    ids: set[int] = set()
    found: set[int] = set()
    names: list[str] = []
    absent: list[str] = []
    for part, spans in (value.get("annotations") or {}).items():
        for objects in spans.values():
            numbers = _numbers(str(objects))
            ids |= numbers
            if part == "answer" and numbers:
                names.append(answer)
    for operation in value.get("semantic") or ():
        if match := _ARGUMENT.fullmatch(operation.get("argument") or ""):
            numbers = _numbers(match["ids"])
            found |= numbers
            if (name := match["name"].strip()) not in ("", "_", "scene"):
                (names if numbers else absent).append(name)
    return ids or found, names, list(dict.fromkeys(absent))


def _numbers(text: str) -> set[int]:
    return set(map(int, re.findall(r"\d+", text)))
