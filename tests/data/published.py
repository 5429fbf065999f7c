"""Small files of the schema that VQAv2 and GQA publish, with images beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

VqaRow = tuple[int, int, str, str, str, list[str]]
"""Question id, image id, question, answer type, gold answer, and the answers of the annotators."""
VQA_ROWS: tuple[VqaRow, ...] = (
    (
        262148000,
        262148,
        "Where is he looking?",
        "other",
        "down",
        ["down"] * 6 + ["at table"] * 3 + ["skateboard"],
    ),
    (262148001, 262148, "Is this indoors?", "yes/no", "no", ["no"] * 9 + ["yes"]),
    (393225000, 393225, "How many dogs are there?", "number", "2", ["2"] * 7 + ["two"] * 3),
)


def write_vqa(folder: Path, rows: tuple[Any, ...] = VQA_ROWS, split: str = "val2014") -> tuple[str, str, str]:
    """Write questions, annotations and images; returns their paths."""
    head = {
        "info": {"year": 2017, "version": "2.0"},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {"name": "CC BY 4.0"},
        "data_subtype": split,
    }
    questions = [{"image_id": i, "question": text, "question_id": q} for q, i, text, *_ in rows]
    annotations = [
        {
            "question_type": text.lower().rsplit(" ", 2)[0],
            "multiple_choice_answer": gold,
            "answers": [
                {"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)
            ],
            "image_id": i,
            "answer_type": kind,
            "question_id": q,
        }
        for q, i, text, kind, gold, answers in rows
    ]
    root = folder / split
    root.mkdir(parents=True, exist_ok=True)
    for _, image, *_ in rows:
        Image.new("RGB", (20, 10), "red").save(root / f"COCO_{split}_{image:012d}.jpg")
    paths = (
        folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
        folder / f"v2_mscoco_{split}_annotations.json",
    )
    for path, key, content in zip(paths, ("questions", "annotations"), (questions, annotations), strict=True):
        path.write_text(json.dumps({**head, key: content}))
    return str(paths[0]), str(paths[1]), str(root)


def gqa_question(
    image: str, text: str, answer: str, kinds: tuple[str, str], /, *arguments: str, **spans: dict[str, str]
) -> dict[str, Any]:
    """A question of the published schema; `arguments` are those of its operations, `spans` its annotations."""
    return {
        "imageId": image,
        "question": text,
        "answer": answer,
        "fullAnswer": f"The answer is {answer}.",
        "isBalanced": True,
        "groups": {"global": None, "local": "10q-x"},
        "entailed": [],
        "equivalent": [],
        "types": {"structural": kinds[0], "semantic": kinds[1], "detailed": "x"},
        "semantic": [
            {"operation": "select" if i == 0 else "relate", "dependencies": [], "argument": argument}
            for i, argument in enumerate(arguments)
        ],
        "semanticStr": "",
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}, **spans},
    }


GQA_QUESTIONS = {
    "1": gqa_question(
        "10", "What is on the table?", "plate", ("query", "rel"), "table (101)", "_,on,s (102)", "name",
        question={"4": "101"}, answer={"0": "102"}, fullAnswer={"1": "102", "5": "101"},
    ),
    "2": gqa_question("10", "Is there a dog?", "no", ("verify", "obj"), "dog (-)", "?"),
    "3": gqa_question("10", "What colour is the chair?", "brown", ("query", "attr"), "chair (103)", "color", question={"4": "103"}),
    "4": gqa_question("11", "Is it sunny?", "no", ("verify", "global"), "scene"),
    "5": gqa_question("11", "Are the animals the same?", "yes", ("logical", "obj"), "animal (201, 202)", question={"2": "201,202"}),
}  # fmt: skip


def _node(name: str, *box: int) -> dict[str, Any]:
    return {"name": name, **dict(zip("xywh", box, strict=True)), "attributes": [], "relations": []}


SCENE_GRAPHS = {
    "10": {
        "width": 20,
        "height": 10,
        "objects": {
            "101": _node("table", 0, 4, 10, 6),
            "102": _node("plate", 2, 4, 3, 3),
            "103": _node("chair", 12, 0, 4, 4),
            "104": _node("chair", 16, 0, 4, 4),
            "105": _node("speck", 3, 3, 2, 4),
        },
    },
    "11": {
        "width": 20,
        "height": 10,
        "objects": {
            "201": _node("cat", 0, 0, 5, 5),
            "202": _node("cow", 8, 0, 5, 5),
            "203": _node("tree", 15, 0, 5, 9),
        },
    },
    "12": {"width": 20, "height": 10, "objects": {}},
}


def write_gqa(
    folder: Path, questions: dict[str, Any] = GQA_QUESTIONS, graphs: dict[str, Any] = SCENE_GRAPHS
) -> tuple[str, str, str]:
    """Write questions, images and scene graphs; returns the paths of questions, image folder and scene graphs."""
    root = folder / "images"
    root.mkdir(parents=True, exist_ok=True)
    for question in questions.values():
        if isinstance(question, dict):
            Image.new("RGB", (20, 10), "red").save(root / f"{question['imageId']}.jpg")
    paths = folder / "train_balanced_questions.json", folder / "train_sceneGraphs.json"
    for path, content in zip(paths, (questions, graphs), strict=True):
        path.write_text(json.dumps(content))
    return str(paths[0]), str(root), str(paths[1])
