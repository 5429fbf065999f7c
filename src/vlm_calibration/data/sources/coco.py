"""Queries from COCO's instance annotations, with exact masks of everything that is annotated.

Three kinds of question: is an object there (half of them about absent objects, drawn as POPE draws them), how many are there, and
is one object left of, right of, above or below another. All is a pure function of the annotations and the seed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from vlm_calibration.data.sources.base import LazyQueries, QuerySource, opposite
from vlm_calibration.data.sources.images import ImageFolder
from vlm_calibration.data.sources.instances import AnnotatedImage, Instance, object_mask, read_instances
from vlm_calibration.data.sources.pope import AbsentObjects, Negatives
from vlm_calibration.perturbation.images import ImageError
from vlm_calibration.records import DataError, LoadedImage, Query, RecordError
from vlm_calibration.text.labels import is_evidence

Kind = Literal["existence", "counting", "spatial"]
SIDES = ("to the left of", "to the right of", "above", "below")
MOST_COUNTED = 9
"""Beyond this many, annotations are not exact."""
IRREGULAR = {
    "person": "people",
    "sheep": "sheep",
    "skis": "skis",
    "scissors": "pairs of scissors",
    "mouse": "mice",
    "knife": "knives",
}


_NUMBER = re.compile(r"(?<!\d)\d{12}(?!\d)")


class Plan(NamedTuple):
    """What a query will be: the index of its image, and the rest of its fields."""

    picture: int
    suffix: str
    question: str
    answer: str
    objects: tuple[str, ...]
    category: str


class CocoSource(QuerySource):
    """Existence, counting and spatial queries over annotated images.

    Args:
        annotations: a file of the form of `instances_val2017.json`.
        root: the folder of the images.
        kinds: which questions to ask.
        negatives: how absent objects are drawn; with several rules, they take turns.
        per_image: at most so many present, and so many absent, objects are asked about in each image; and so many counting
            and spatial questions each.
        images: use only so many images, drawn at random; None: all that have annotations.
        exclude: files that name images to leave out by their numbers of twelve digits, in whatever form: POPE's question
            files, for one, whose images of val2014 are part of train2017.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        annotations: str,
        root: str,
        kinds: list[Kind] = ["existence", "counting", "spatial"],  # noqa: B006  (never changed)
        negatives: list[Negatives] = ["random", "popular", "adversarial"],  # noqa: B006
        per_image: int = 3,
        images: int | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        if not kinds or ("existence" in kinds and not negatives) or per_image < 1:
            raise DataError(
                "CocoSource: needs at least one of `kinds` and of `negatives`, and per_image >= 1"
            )
        self.annotations = Path(annotations)
        self.root = Path(root)
        self.kinds = list(kinds)
        self.negatives = list(negatives)
        self.per_image = per_image
        self.images = images
        self.exclude = [Path(path) for path in exclude or ()]
        self.seed = seed
        self._files = ImageFolder(self.root)

    @cached_property
    def _pictures(self) -> list[AnnotatedImage]:
        excluded = {number for path in self.exclude for number in _numbers(path)}
        pictures = [
            p for p in read_instances(self.annotations) if not excluded & set(_NUMBER.findall(p.file))
        ]
        if self.images is not None and self.images < len(pictures):
            chosen = np.random.default_rng(self.seed).permutation(len(pictures))[: self.images]
            pictures = [pictures[i] for i in sorted(chosen)]
        return pictures

    @cached_property
    def _plans(self) -> list[Plan]:
        pictures = self._pictures
        absent = AbsentObjects({p.file: p.objects for p in pictures})
        plans: list[Plan] = []
        for i, picture in enumerate(pictures):
            try:
                self._files.check(picture.file)
            except RecordError as error:
                raise DataError(f"{self.annotations}: {error}") from error
            rng = np.random.default_rng([self.seed, i])
            if "existence" in self.kinds:
                plans += self._existence(i, picture, absent, rng)
            if "counting" in self.kinds:
                plans += _some(list(_counting(i, picture)), self.per_image, rng)
            if "spatial" in self.kinds:
                plans += _some(list(_spatial(i, picture, rng)), self.per_image, rng)
        if not plans:
            raise DataError(f"{self.annotations}: no question of these kinds can be asked about these images")
        return plans

    def _existence(
        self, index: int, picture: AnnotatedImage, absent: AbsentObjects, rng: np.random.Generator
    ) -> Iterator[Plan]:
        """A present object, then an absent one, and so on."""
        taken = list(picture.objects)
        order = rng.permutation(len(picture.objects))[: self.per_image]
        for turn, present in enumerate(picture.objects[i] for i in order):
            rule = self.negatives[(index + turn) % len(self.negatives)]
            missing = absent.draw(rule, present, taken, rng)
            if missing is None:
                return  # half of the questions are about absent objects, always
            taken.append(missing)
            yield Plan(index, f"yes-{turn}", _is_there(present), "Yes", (present,), "existence/present")
            yield Plan(index, f"no-{turn}", _is_there(missing), "No", (missing,), f"existence/{rule}")

    def queries(self) -> Sequence[Query]:
        return LazyQueries(len(self._plans), self._query)

    def _query(self, index: int) -> Query:
        plan = self._plans[index]
        return Query(
            id=f"{self._pictures[plan.picture].file}:{plan.suffix}",
            image=self._pictures[plan.picture].file,
            question=plan.question,
            answer=plan.answer,
            answer_type="short" if plan.category == "counting" else "yes_no",
            objects=plan.objects,
            category=plan.category,
        )

    @cached_property
    def _places(self) -> dict[str, int]:
        return {p.file: i for i, p in enumerate(self._pictures)}

    def _picture(self, query: Query) -> AnnotatedImage:
        return self._pictures[self._places[query.image]]

    def load(self, query: Query) -> LoadedImage:
        picture = self._picture(query)
        try:
            image = self._files.load(picture.file)
            if image.shape[:2] != (picture.height, picture.width):
                raise RecordError(
                    f"{picture.file} has {image.shape[1]} x {image.shape[0]} pixels, annotated for "
                    f"{picture.width} x {picture.height}"
                )
            masks = [(name, object_mask(picture, name)) for name in picture.objects]
        except (RecordError, ImageError) as error:
            raise DataError(f"{self.annotations}: record {query.id!r}: {error}") from error
        return LoadedImage(
            image,
            tuple(m for name, m in masks if is_evidence(query, name) and m.any()),
            tuple(m for name, m in masks if not is_evidence(query, name) and m.any()),
        )

    def has_evidence(self, query: Query) -> bool:
        return any(is_evidence(query, name) for name in self._picture(query).objects)

    def wrong_answers(self, query: Query) -> Sequence[str]:
        if query.answer_type == "yes_no":
            return opposite(query)
        count = int(query.answer)
        return [str(n) for n in (count - 1, count + 1) if n > 0]


def _numbers(path: Path) -> set[str]:
    """The numbers of images that a file names.

    Raises:
        DataError: the file cannot be read, or names none.
    """
    try:
        numbers = set(_NUMBER.findall(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read which images to leave out: {error}") from error
    if not numbers:
        raise DataError(f"{path}: names no image by a number of twelve digits")
    return numbers


def _counting(index: int, picture: AnnotatedImage) -> Iterator[Plan]:
    """How many there are, for every object that is not in a crowd."""
    for name in picture.objects:
        same = [i for i in picture.instances if i.name == name]
        if len(same) <= MOST_COUNTED and not any(i.crowd for i in same):
            question = f"How many {_plural(name)} are there in the image?"
            yield Plan(index, f"count-{name}", question, str(len(same)), (name,), "counting")


def _spatial(index: int, picture: AnnotatedImage, rng: np.random.Generator) -> Iterator[Plan]:
    """Where one object is with respect to another, for every two that are there once and lie apart; half are not so."""
    single = [
        i for i in picture.instances if [o.name for o in picture.instances].count(i.name) == 1 and not i.crowd
    ]
    for a in single:
        for b in single:
            for axis, (before, behind) in enumerate((SIDES[:2], SIDES[2:])):
                if a.name < b.name and _apart(a, b, axis):
                    true = before if a.box[axis] < b.box[axis] else behind
                    asked = (before, behind)[int(rng.integers(2))]
                    question = f"Is the {a.name} {asked} the {b.name}?"
                    answer = "Yes" if asked == true else "No"
                    suffix = f"{asked.split()[-2] if axis == 0 else asked}-{a.name}-{b.name}"
                    yield Plan(index, suffix, question, answer, (a.name, b.name), "spatial")


def _apart(a: Instance, b: Instance, axis: int) -> bool:
    """Whether the boxes do not overlap along an axis (0: x, 1: y)."""
    first, second = sorted((i.box[axis], i.box[axis] + i.box[axis + 2]) for i in (a, b))
    return first[1] <= second[0]


def _some(plans: list[Plan], most: int, rng: np.random.Generator) -> list[Plan]:
    return [plans[i] for i in sorted(rng.permutation(len(plans))[:most])]


def _is_there(name: str) -> str:
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def _plural(name: str) -> str:
    head, _, last = name.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "sh", "ch", "x")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()
