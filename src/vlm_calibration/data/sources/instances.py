"""COCO's instance annotations (Lin et al., arXiv 1405.0312): which objects are where in which image, and their masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from vlm_calibration.records import DataError, RecordError


class Instance(NamedTuple):
    """One annotation: the object's name, box (x, y, width, height) in pixels, COCO's segmentation, and whether it is a crowd."""

    name: str
    box: tuple[float, float, float, float]
    segmentation: Any
    crowd: bool


class AnnotatedImage(NamedTuple):
    """An image: file name, size in pixels, and what is annotated in it."""

    file: str
    height: int
    width: int
    instances: tuple[Instance, ...]

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of what is there, each once."""
        return tuple(dict.fromkeys(i.name for i in self.instances))


def read_instances(path: Path) -> list[AnnotatedImage]:
    """The images of an annotation file that have annotations, in the order of their file names.

    Raises:
        DataError: the file cannot be read, or is not of this form.
    """
    try:
        content = json.loads(path.read_bytes())
        names = {c["id"]: c["name"] for c in content["categories"]}
        instances: dict[int, list[Instance]] = {}
        for a in content.pop("annotations"):
            x, y, width, height = map(float, a["bbox"])
            shape = _compact(a["segmentation"])
            found = Instance(names[a["category_id"]], (x, y, width, height), shape, bool(a.get("iscrowd")))
            instances.setdefault(a["image_id"], []).append(found)
        pictures = [
            AnnotatedImage(i["file_name"], i["height"], i["width"], tuple(instances[i["id"]]))
            for i in content["images"]
            if i["id"] in instances
        ]
    except OSError as error:
        raise DataError(f"{path}: cannot read the annotations: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not COCO instance annotations: {type(error).__name__}: {error}") from error
    if not pictures:
        raise DataError(f"{path}: no image with annotations")
    return sorted(pictures, key=lambda p: p.file)


def _compact(segmentation: Any) -> Any:
    """Polygons as arrays, which take a tenth of the memory of lists; run lengths as they are."""
    if isinstance(segmentation, list):
        return [np.asarray(polygon, dtype=np.float64) for polygon in segmentation]
    return segmentation


def instance_mask(instance: Instance, height: int, width: int) -> np.ndarray:
    """The pixels of one annotation, bool [height, width], as pycocotools draws them.

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
    """The pixels of all instances of an object, bool [height, width]."""
    union = np.zeros((picture.height, picture.width), dtype=bool)
    for instance in picture.instances:
        if instance.name == name:
            union |= instance_mask(instance, picture.height, picture.width)
    return union
