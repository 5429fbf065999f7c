"""COCO's instance annotations (Lin et al., arXiv 1405.0312): annotated images and the masks of their objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from vlm_calibration.files import read_json
from vlm_calibration.records import DataError, RecordError


class Instance(NamedTuple):
    """An annotated object.

    Attributes:
        name: name of the category.
        box: (x, y, width, height) in pixels.
        segmentation: polygons or run lengths, as in COCO.
        crowd: whether the annotation marks a crowd.
    """

    name: str
    box: tuple[float, float, float, float]
    segmentation: Any
    crowd: bool


class AnnotatedImage(NamedTuple):
    """An image with its annotations.

    Attributes:
        file: file name.
        height: in pixels.
        width: in pixels.
        instances: the annotated objects.
    """

    file: str
    height: int
    width: int
    instances: tuple[Instance, ...]

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the annotated objects, each once."""
        return tuple(dict.fromkeys(i.name for i in self.instances))


def read_instances(path: Path) -> list[AnnotatedImage]:
    """Read the images of an annotation file that have annotations, in the order of their file names.

    Raises:
        DataError: the file cannot be read, or has another format.
    """
    content = read_json(path)
    try:
        names = {c["id"]: c["name"] for c in content["categories"]}
        instances: dict[int, list[Instance]] = {}
        for a in content.pop("annotations"):
            x, y, width, height = map(float, a["bbox"])
            shape = _compact(a["segmentation"])
            instance = Instance(names[a["category_id"]], (x, y, width, height), shape, bool(a.get("iscrowd")))
            instances.setdefault(a["image_id"], []).append(instance)
        pictures = [
            AnnotatedImage(i["file_name"], i["height"], i["width"], tuple(instances[i["id"]]))
            for i in content["images"]
            if i["id"] in instances
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not COCO instance annotations: {type(error).__name__}: {error}") from error
    if not pictures:
        raise DataError(f"{path}: no image with annotations")
    return sorted(pictures, key=lambda p: p.file)


def _compact(segmentation: Any) -> Any:
    """Convert polygons to arrays, which take a tenth of the memory of lists; leave run lengths unchanged."""
    if isinstance(segmentation, list):
        return [np.asarray(polygon, dtype=np.float64) for polygon in segmentation]
    return segmentation


def instance_mask(instance: Instance, height: int, width: int) -> np.ndarray:
    """The mask of one annotation, bool [height, width], drawn by pycocotools.

    Raises:
        RecordError: the segmentation cannot be drawn.
    """
    shape = instance.segmentation
    try:
        if isinstance(shape, list):
            encoded = rle.merge(rle.frPyObjects([p.tolist() for p in shape], height, width))
        elif isinstance(shape["counts"], list):
            encoded = rle.frPyObjects(shape, height, width)
        else:
            encoded = shape
        if list(encoded["size"]) != [height, width]:
            raise ValueError(f"made for {encoded['size']}, the image has {[height, width]}")
        return rle.decode(encoded).astype(bool)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise RecordError(f"the segmentation of a {instance.name} cannot be drawn: {error}") from error


def object_mask(picture: AnnotatedImage, name: str) -> np.ndarray:
    """The union of the masks of all instances of an object, bool [height, width]."""
    union = np.zeros((picture.height, picture.width), dtype=bool)
    for instance in picture.instances:
        if instance.name == name:
            union |= instance_mask(instance, picture.height, picture.width)
    return union
