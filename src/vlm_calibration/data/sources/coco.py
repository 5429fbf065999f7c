"""Source that generates queries from COCO's instance annotations, with exact masks of all annotated objects.

POPE's rules (arXiv 2305.10355, its official `utils.py`) choose an object that is not in the image: *random* any, *popular* the most
frequent, *adversarial* the one most often together with the object asked about before. The first in the table wins a tie; without a candidate, *random*.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools import mask as rle

from vlm_calibration.data.sources.base import ImageFolder, QuerySource, excluded_images, opposite, with_masks
from vlm_calibration.files import read_json
from vlm_calibration.perturbation.images import ImageError
from vlm_calibration.progress import track
from vlm_calibration.records import AnswerType, DataError, LoadedImage, Query, RecordError

Kind = Literal["existence", "counting", "spatial"]
Negatives = Literal["random", "popular", "adversarial"]
SIDES = ("to the left of", "to the right of", "above", "below")
IRREGULAR_PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "skis": "skis",
    "scissors": "pairs of scissors",
    "mouse": "mice",
    "knife": "knives",
}


class Instance(NamedTuple):
    """An annotated object: its box (x, y, width, height) in pixels, polygons or run lengths, and whether it is a crowd."""

    box: tuple[float, float, float, float]
    segmentation: Any
    crowd: bool


class AnnotatedImage(NamedTuple):
    """An image, its size in pixels, and its annotated objects by their names."""

    file: str
    height: int
    width: int
    objects: dict[str, list[Instance]]


def read_instances(path: Path) -> list[AnnotatedImage]:
    """The images with annotations, in the order of their file names; a DataError if the file has another format."""
    content = read_json(path)
    try:
        names = {c["id"]: c["name"] for c in content["categories"]}
        objects: dict[int, dict[str, list[Instance]]] = {}
        for a in content.pop("annotations"):
            x, y, width, height = map(float, a["bbox"])
            shape = a["segmentation"]
            if isinstance(shape, list):
                # Polygons as arrays take a tenth of the memory of lists.
                shape = [np.asarray(polygon, dtype=np.float64) for polygon in shape]
            instance = Instance((x, y, width, height), shape, bool(a.get("iscrowd")))
            objects.setdefault(a["image_id"], {}).setdefault(names[a["category_id"]], []).append(instance)
        pictures = [
            AnnotatedImage(i["file_name"], i["height"], i["width"], objects[i["id"]])
            for i in content["images"]
            if i["id"] in objects
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not COCO instance annotations: {type(error).__name__}: {error}") from error
    if not pictures:
        raise DataError(f"{path}: no image with annotations")
    return sorted(pictures, key=lambda p: p.file)


def object_mask(picture: AnnotatedImage, name: str) -> np.ndarray:
    """The union of the masks of all instances of an object, bool [height, width]; a RecordError if one cannot be drawn."""
    size = [picture.height, picture.width]
    union = np.zeros(size, dtype=bool)
    for instance in picture.objects[name]:
        shape = instance.segmentation
        try:
            if isinstance(shape, list):
                shape = rle.merge(rle.frPyObjects([polygon.tolist() for polygon in shape], *size))
            elif isinstance(shape["counts"], list):
                shape = rle.frPyObjects(shape, *size)
            if list(shape["size"]) != size:
                raise ValueError(f"made for {shape['size']}, the image has {size}")
            union |= rle.decode(shape).astype(bool)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise RecordError(f"the segmentation of a {name} cannot be drawn: {error}") from error
    return union


class AbsentObjects:
    """Draws objects that are not in an image, by POPE's rules, from the names of each image's objects."""

    def __init__(self, objects_of_images: Iterable[Sequence[str]]) -> None:
        frequency: Counter[str] = Counter()
        cooccurrence: dict[str, Counter[str]] = defaultdict(Counter)
        for objects in objects_of_images:
            frequency.update(objects)
            for name in objects:
                cooccurrence[name].update(o for o in objects if o != name)
        self.objects = list(frequency)
        self.popular = [name for name, _ in frequency.most_common()]
        self.adversarial = {name: [o for o, _ in c.most_common()] for name, c in cooccurrence.items()}

    def draw(self, rule: Negatives, present: str, taken: list[str], rng: np.random.Generator) -> str | None:
        """Draw an object that is not `taken`, None if there is none, after a question about one that is `present`."""
        excluded = set(taken)
        ranked = {"random": [], "popular": self.popular, "adversarial": self.adversarial.get(present, [])}
        for name in ranked[rule]:
            if name not in excluded:
                return name
        candidates = [name for name in self.objects if name not in excluded]
        return candidates[int(rng.integers(len(candidates)))] if candidates else None


class CocoSource(QuerySource):
    """Existence, counting and spatial queries over annotated images, a pure function of the annotations and the seed.

    Half of the existence queries are about absent objects. Spatial queries ask for the relative position of two objects.

    Args:
        annotations: a file in the format of `instances_val2017.json`.
        root: image folder.
        kinds: kinds of questions.
        negatives: rules that absent objects are drawn by, in turn.
        per_image: maximum number per image of questions about present objects, about absent objects, of counting and of
            spatial questions, each.
        images: number of images, drawn at random; None: all annotated images.
        first: position in the random order at which the images begin. Sources of one file, `exclude` and seed have no image in
            common if their positions do not overlap, e.g. 0 to 299 and 300 to 999.
        exclude: text files, such as POPE's question files, whose images (of val2014) are part of train2017 and val2017; an image
            is excluded if its twelve-digit number occurs in one.
        seed: seed of all random choices.
    """

    annotates_all = True

    def __init__(
        self,
        annotations: str,
        root: str,
        kinds: list[Kind] = ["existence", "counting", "spatial"],  # noqa: B006  (never changed)
        negatives: list[Negatives] = ["random", "popular", "adversarial"],  # noqa: B006
        per_image: int = 3,
        images: int | None = None,
        first: int = 0,
        exclude: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        if first < 0 or (images is not None and images < 1):
            raise DataError(f"CocoSource: needs images >= 1 and first >= 0, found {images} and {first}")
        if not kinds or ("existence" in kinds and not negatives) or per_image < 1:
            raise DataError("CocoSource: needs one of `kinds` and of `negatives`, and per_image >= 1")
        self.annotations, self.root = Path(annotations), Path(root)
        self.kinds, self.negatives = list(kinds), list(negatives)
        self.per_image, self.images, self.first, self.seed = per_image, images, first, seed
        self.exclude = [Path(path) for path in exclude or ()]
        self._files = ImageFolder(self.root)

    @cached_property
    def _annotated(self) -> dict[str, AnnotatedImage]:
        """The images by their file names."""
        is_excluded = excluded_images(self.exclude)
        images = [image for image in read_instances(self.annotations) if not is_excluded(image.file)]
        if self.first and self.first >= len(images):
            raise DataError(f"{self.annotations}: first: {self.first} of {len(images)} annotated images")
        count = len(images) if self.images is None else self.images
        chosen = np.random.default_rng(self.seed).permutation(len(images))[self.first : self.first + count]
        return {images[i].file: images[i] for i in sorted(chosen)}

    @cached_property
    def _queries(self) -> list[Query]:
        annotated = self._annotated.values()
        absent = AbsentObjects(list(image.objects) for image in annotated)
        queries: list[Query] = []
        for i, image in enumerate(track(annotated, f"checking {self.annotations}", len(annotated), "images")):
            try:
                self._files.check(image.file)
            except RecordError as error:
                raise DataError(f"{self.annotations}: {error}") from error
            rng = np.random.default_rng([self.seed, i])
            if "existence" in self.kinds:
                queries += self._existence(i, image, absent, rng)
            for kind, questions in (("counting", _counting(image)), ("spatial", _spatial(image, rng))):
                if kind in self.kinds:
                    possible = list(questions)
                    queries += [possible[j] for j in sorted(rng.permutation(len(possible))[: self.per_image])]
        if not queries:
            raise DataError(f"{self.annotations}: no question of these kinds can be asked about these images")
        return queries

    def _existence(
        self, index: int, image: AnnotatedImage, absent: AbsentObjects, rng: np.random.Generator
    ) -> Iterator[Query]:
        """Questions about a present and an absent object in turn."""
        names = list(image.objects)
        taken = names.copy()
        for turn, present in enumerate(names[i] for i in rng.permutation(len(names))[: self.per_image]):
            rule = self.negatives[(index + turn) % len(self.negatives)]
            if (missing := absent.draw(rule, present, taken, rng)) is None:
                return  # exactly half of the questions are about absent objects
            taken.append(missing)
            for name, answer, category in ((present, "Yes", "present"), (missing, "No", rule)):
                question = f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"
                suffix = f"{answer.lower()}-{turn}"
                yield _query(image, suffix, question, answer, (name,), f"existence/{category}")

    def queries(self) -> Sequence[Query]:
        return self._queries

    def image_file(self, query: Query) -> Path:
        return self._files.path(query.image)

    def load(self, query: Query) -> LoadedImage:
        annotated = self._annotated[query.image]
        try:
            image = self._files.load(annotated.file)
            height, width = image.shape[:2]
            if (height, width) != (annotated.height, annotated.width):
                expected = f"annotated for {annotated.height} x {annotated.width}"
                raise RecordError(f"{annotated.file} has {height} x {width} pixels, {expected}")
            masks = [(name, object_mask(annotated, name)) for name in annotated.objects]
        except (RecordError, ImageError) as error:
            raise DataError(f"{self.annotations}: record {query.id!r}: {error}") from error
        return with_masks(query, image, [(name, mask) for name, mask in masks if mask.any()])

    def labels(self, query: Query) -> Sequence[str]:
        return list(self._annotated[query.image].objects)

    def wrong_answers(self, query: Query) -> Sequence[str]:
        if query.answer_type == "yes_no":
            return opposite(query)
        count = int(query.answer)
        return [str(n) for n in (count - 1, count + 1) if n > 0]


def _query(
    image: AnnotatedImage, suffix: str, question: str, answer: str, objects: tuple[str, ...], category: str
) -> Query:
    kind: AnswerType = "short" if category == "counting" else "yes_no"
    return Query(f"{image.file}:{suffix}", image.file, question, answer, kind, objects, category=category)


def _counting(image: AnnotatedImage) -> Iterator[Query]:
    """Questions about the number of instances of every object that is not in a crowd; annotations of more than 9 are not exact."""
    for name, same in image.objects.items():
        if len(same) <= 9 and not any(i.crowd for i in same):
            question = f"How many {_plural(name)} are there in the image?"
            yield _query(image, f"count-{name}", question, str(len(same)), (name,), "counting")


def _spatial(image: AnnotatedImage, rng: np.random.Generator) -> Iterator[Query]:
    """Questions about the relative position of any two objects that occur once and do not overlap; half are false."""
    single = {name: same[0] for name, same in image.objects.items() if len(same) == 1}
    boxes = {name: instance.box for name, instance in single.items() if not instance.crowd}
    for a, b in product(boxes, boxes):
        for axis, (before, after) in enumerate((SIDES[:2], SIDES[2:])):
            first, second = sorted((boxes[i][axis], boxes[i][axis] + boxes[i][axis + 2]) for i in (a, b))
            if a < b and first[1] <= second[0]:
                true = before if boxes[a][axis] < boxes[b][axis] else after
                asked = (before, after)[int(rng.integers(2))]
                suffix = f"{asked.split()[-2] if axis == 0 else asked}-{a}-{b}"
                answer = "Yes" if asked == true else "No"
                yield _query(image, suffix, f"Is the {a} {asked} the {b}?", answer, (a, b), "spatial")


def _plural(name: str) -> str:
    head, _, last = name.rpartition(" ")
    if last in IRREGULAR_PLURALS:
        last = IRREGULAR_PLURALS[last]
    elif last.endswith(("s", "sh", "ch", "x")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()
