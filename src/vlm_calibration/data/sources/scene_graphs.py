"""GQA's scene graphs (Hudson and Manning, arXiv 1902.09506): the objects of each image and their boxes.

Only names and boxes of the objects of wanted images are kept, as arrays: the decoded file of the training images takes gigabytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.json_stream import json_members
from vlm_calibration.records import MIN_BOX, DataError, RecordError, short_repr


class SceneObject(NamedTuple):
    """An object of an image.

    Attributes:
        id: its key in the scene graph.
        name: e.g. "chair".
        box: (x0, y0, x1, y1) in pixels.
    """

    id: int
    name: str
    box: tuple[int, int, int, int]


class SceneGraphs:
    """The objects of images.

    Args:
        path: `train_sceneGraphs.json` or `val_sceneGraphs.json`.
        images: ids of the images to keep.

    Attributes:
        small: number of objects that were left out since their box is empty or smaller than `MIN_BOX`.

    Raises:
        DataError: the file cannot be read, or has another format.
    """

    def __init__(self, path: Path, images: Collection[str]) -> None:
        self._spans: dict[str, tuple[int, int]] = {}
        self._ids, self._names, self._boxes = array("q"), array("i"), array("i")
        self._vocabulary: dict[str, int] = {}
        self.small = 0
        for item in json_members(path):
            if item.key is not None and item.key in images:
                begin = len(self._ids)
                item.read(self._add)
                self._spans[item.key] = begin, len(self._ids)
        self._words = list(self._vocabulary)

    def objects(self, image: str) -> Iterator[SceneObject]:
        """The objects of an image; none if it has no scene graph."""
        for i in range(*self._spans.get(image, (0, 0))):
            x0, y0, x1, y1 = self._boxes[4 * i : 4 * i + 4]
            yield SceneObject(self._ids[i], self._words[self._names[i]], (x0, y0, x1, y1))

    def __len__(self) -> int:
        return len(self._spans)

    def _add(self, graph: Any) -> None:
        objects = graph.get("objects") if isinstance(graph, Mapping) else None
        if not isinstance(objects, Mapping):
            raise RecordError(f"expected a scene graph with 'objects', found {short_repr(graph)}")
        for key, value in objects.items():
            try:
                name, (x, y, w, h) = value["name"], (int(value[k]) for k in "xywh")
                number = int(key)
            except (KeyError, TypeError, ValueError) as error:
                raise RecordError(
                    f"object {key!r} must have a name and whole numbers x, y, w, h, found {short_repr(value)}"
                ) from error
            if min(w, h) <= 0 or w * h < MIN_BOX:
                self.small += 1
                continue
            self._ids.append(number)
            self._names.append(self._vocabulary.setdefault(str(name), len(self._vocabulary)))
            self._boxes.extend((x, y, x + w, y + h))


def check_scene_graphs(path: Path, graphs: SceneGraphs, images: int) -> None:
    """Make sure that the scene graphs are those of the questions; DataError if no image has one."""
    if not len(graphs):
        raise DataError(
            f"{path}: none of the {images} images has a scene graph in this file: use that of the same split as the questions"
        )
