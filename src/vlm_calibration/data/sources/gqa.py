"""Source for GQA (Hudson and Manning, arXiv 1902.09506): its questions, its images and, for regions, its scene graphs.

The annotations of a question say which objects of the scene graph its words and those of its answer stand for: these are the key
objects, and objects of other names are distractors. Boxes are those of the scene graph, which only training and validation images
have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_warn

from vlm_calibration.data.sources.base import OnBadRecord
from vlm_calibration.data.sources.published import COLUMNS, PublishedSource
from vlm_calibration.data.sources.scene_graphs import SceneGraphs, check_scene_graphs
from vlm_calibration.json_stream import json_members
from vlm_calibration.records import SMALL_BOX, DataError, Query, RecordError, Region, short_repr
from vlm_calibration.text.conventions import infer_answer_type
from vlm_calibration.text.matching import match_key

_ARGUMENT = re.compile(r"(?P<name>[^,()]*)[^()]*\((?P<ids>[-\d,\s]*)\)\s*")
"""The argument of an operation that finds an object: "horse,on the edge of,s (447018)", or "dog (-)" for one that is absent."""
_ANONYMOUS = frozenset(("", "_", "scene"))
ABOUT_OBJECTS = frozenset(("obj", "cat", "rel"))
"""Semantic types of questions whose answer is an object's name: only for these are other objects' names plausible answers."""


class GqaSource(PublishedSource):
    """One query a question; its category is "STRUCTURAL TYPE/SEMANTIC TYPE", such as "query/attr".

    Args:
        questions: e.g. `train_balanced_questions.json`, or the folder `train_all_questions`.
        root: the folder of images.
        scene_graphs: e.g. `train_sceneGraphs.json`; None: no regions. The phrases of key objects are known without it.
        begin: use the images from this share on, in [0, 1]; see `ImageShare`.
        end: use the images up to this share, in [0, 1].
        on_bad_record: "raise" stops at the first invalid question; "skip" leaves such questions out, with a warning.
    """

    columns: ClassVar[Mapping[str, pa.DataType]] = {
        **COLUMNS,
        "keys": pa.list_(pa.int64()),
        "names": pa.list_(pa.string()),
        "absent": pa.list_(pa.string()),
    }

    def __init__(
        self,
        questions: str,
        root: str,
        scene_graphs: str | None = None,
        begin: float = 0.0,
        end: float = 1.0,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        super().__init__(questions, root, begin, end, on_bad_record)
        self.questions = questions
        self.scene_graphs = scene_graphs
        self._graphs: SceneGraphs | None = None

    def _rows(self) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
        for file in self._question_files():
            for item in json_members(file):
                try:
                    yield item.where, _row(item.key, item.value)
                except RecordError as error:
                    yield item.where, RecordError(f"question {item.key!r}: {error}")

    def _question_files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        files = sorted(self.path.glob("*.json"))
        if not files:
            raise DataError(f"{self.path}: no *.json file in this folder")
        return files

    def _prepare(self, table: pa.Table) -> None:
        if self.scene_graphs is None:
            return
        path = Path(self.scene_graphs)
        images = {Path(name).stem for name in table.column("image").unique().to_pylist()}
        self._graphs = SceneGraphs(path, images)
        check_scene_graphs(path, self._graphs, len(images))
        if self._graphs.small:
            rank_zero_warn(f"{path}: the box of {self._graphs.small} objects {SMALL_BOX}: they are left out")

    def _make(self, row: Mapping[str, Any]) -> Query:
        keys, names = set(row["keys"]), dict.fromkeys((*row["names"], *row["absent"]))
        query = super()._make(row)
        objects = [] if self._graphs is None else list(self._graphs.objects(Path(query.image).stem))
        located = [o for o in objects if o.id in keys]
        names.update(dict.fromkeys(o.name for o in located))
        # Another chair is neither evidence about this chair nor a part of the image that the question is not about.
        taken = {match_key(name) for name in names}
        regions = tuple(
            Region(o.name, o.box) for o in objects if o.id in keys or match_key(o.name) not in taken
        )
        return Query(
            id=query.id,
            image=query.image,
            question=query.question,
            answer=query.answer,
            answer_type=query.answer_type,
            # The scene graph's own names, which are those of regions, once it has every key object: "animal" is a cat and a cow.
            objects=tuple(
                dict.fromkeys(o.name for o in located) if keys and len(located) == len(keys) else names
            ),
            # A question about the scene as a whole names no object, so no region shows what it is about.
            regions=regions if names else (),
            category=query.category,
            synonyms=query.synonyms,
            absent=tuple(row["absent"]),
        )

    def wrong_answers(self, query: Query) -> Sequence[str]:
        semantic = (query.category or "").rpartition("/")[2]
        if query.answer_type == "short" and semantic not in ABOUT_OBJECTS:
            return []
        return super().wrong_answers(query)


def _row(key: str | None, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RecordError(f"expected a question, found {short_repr(value)}")
    answer, image = value.get("answer"), value.get("imageId")
    if not isinstance(answer, str):
        raise RecordError(f"'answer' must be a text, found {short_repr(answer)}; the test split has none")
    if not isinstance(image, str) or not image:
        raise RecordError(f"'imageId' must be a text, found {short_repr(image)}")
    full = value.get("fullAnswer")
    types = value.get("types")
    kinds = [types.get(kind) for kind in ("structural", "semantic")] if isinstance(types, Mapping) else []
    is_yes_no = infer_answer_type(answer) == "yes_no"
    keys, names, absent = _key_objects(value, answer)
    return {
        "id": key,
        "image": f"{image}.jpg",
        "question": value.get("question"),
        "answer": answer,
        "answer_type": "yes_no" if is_yes_no else "short",
        "category": "/".join(str(kind) for kind in kinds if kind) or None,
        "synonyms": [full] if isinstance(full, str) and full and not is_yes_no else [],
        "keys": keys,
        "names": names,
        "absent": absent,
    }


def _key_objects(value: Mapping[str, Any], answer: str) -> tuple[list[int], list[str], list[str]]:
    """The ids of the objects that a question is about, the names that it and its answer give them, and the names of absent objects.

    Absent objects have a name and no id.
    """
    ids: dict[int, None] = {}
    found: dict[int, None] = {}
    names: dict[str, None] = {}
    absent: dict[str, None] = {}
    annotations = value.get("annotations")
    for part, spans in annotations.items() if isinstance(annotations, Mapping) else ():
        for objects in spans.values() if isinstance(spans, Mapping) else ():
            numbers = list(map(int, re.findall(r"\d+", str(objects))))
            ids.update(dict.fromkeys(numbers))
            if part == "answer" and numbers:
                names[answer] = None
    for operation in value.get("semantic") or ():
        argument = operation.get("argument") if isinstance(operation, Mapping) else None
        match = _ARGUMENT.fullmatch(argument) if isinstance(argument, str) else None
        if match is not None:
            numbers = list(map(int, re.findall(r"\d+", match["ids"])))
            found.update(dict.fromkeys(numbers))
            if (name := match["name"].strip()) not in _ANONYMOUS:
                (names if numbers else absent)[name] = None
    return list(ids or found), list(names), list(absent)
