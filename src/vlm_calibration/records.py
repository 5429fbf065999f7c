"""The records that the whole project passes around, checked once, when they are read; fields are the keys of the JSON lines."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

AnswerType = Literal["yes_no", "short", "open"]
ANSWER_TYPES: tuple[str, ...] = get_args(AnswerType)
MIN_BOX = 9
"""Smallest area of a region's box, in pixels: a perturbation of less is not seen."""
ORIGINAL = "original"
"""Key of the confidence that all probed confidences are compared with."""
SMALL_BOX = f"covers fewer than {MIN_BOX} pixels"
"""Part of the message about a smaller box."""


class RecordError(ValueError):
    """An invalid record. The message names the field, the value found and the value expected."""


class DataError(ValueError):
    """Invalid data or settings. The message is one line that names the file, line, record or key, and the cause."""


@dataclass(frozen=True)
class Region:
    """A part of an image.

    Attributes:
        label: name of the object in the region, e.g. "dog".
        box: (x0, y0, x1, y1) in pixels of the original image, x1 and y1 exclusive; without a mask of at least `MIN_BOX` pixels.
        mask: COCO run-length encoding, {"size": [height, width], "counts": ...}; None: the whole box.
        score: the detector's confidence in [0, 1]; None for an annotated or rendered region.
    """

    label: str
    box: tuple[float, float, float, float]
    mask: Mapping[str, Any] | None = None
    score: float | None = None


@dataclass(frozen=True)
class Query:
    """A question about an image with its gold answer.

    Attributes:
        id: unique within the data set.
        image: path of the image relative to the data root, or a name that the source resolves.
        question: the question, which does not mention confidence.
        answer: the gold answer, which does not mention confidence.
        answer_type: how the answer is graded.
        objects: phrases for the key objects, which the question is about. Regions with one of these labels are evidence
            (see `text.labels.is_evidence`), all others are distractors; without `objects`, every region is evidence.
        regions: where objects are in the image.
        category: group for breaking down results; "a/b" counts in a and in b (see `category_groups`).
        synonyms: further correct answers.
        absent: objects that the answer says are not in the image, repeated from `objects` or not. Without any, the form of the
            question and its answer decide (see `text.labels.absent_objects`).
        wrong_answers: plausible wrong answers; empty if none is, None if the data does not say.
    """

    id: str
    image: str
    question: str
    answer: str
    answer_type: AnswerType
    objects: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    category: str | None = None
    synonyms: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    wrong_answers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one query; the fields are the keys of `predictions.jsonl`.

    Attributes:
        id: id of the query.
        question: the question.
        answer: the gold answer.
        text: the generated text.
        predicted: the answer parsed from the text; None if there is none.
        confidence: the stated confidence in [0, 1]; None if it could not be parsed.
        correct: whether the prediction matches the gold answer.
        category: category of the query.
        perturbation: kind of perturbation of the evidence, "" for an untouched image; None where it is not known.
        strength: of the perturbation, in [0, 1], 0 for an untouched image; None where it is not known.
        noise_step: diffusion step of noise, 0 for an untouched image; None for other kinds and where it is not known.
        answer_type: how the answer was graded.
    """

    id: str
    question: str
    answer: str
    text: str
    predicted: str | None
    confidence: float | None
    correct: bool
    category: str | None
    noise_step: int | None
    answer_type: AnswerType
    perturbation: str | None = None
    strength: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_KEYS = frozenset(f.name for f in fields(Query))
_SURROGATE = re.compile("[\ud800-\udfff]")


class LoadedImage(NamedTuple):
    """A query's image and region masks.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        evidence: bool [H, W] masks of the key objects.
        distractors: bool [H, W] masks of the other objects.
        clipped: whether a part of a region lies outside the image.
    """

    image: np.ndarray
    evidence: tuple[np.ndarray, ...]
    distractors: tuple[np.ndarray, ...]
    clipped: bool = False


def category_groups(category: str | None) -> tuple[str, ...]:
    """The groups that a category counts in: its parts, in order and each once.

    >>> category_groups("shifted/existence")
    ('shifted', 'existence')
    """
    return tuple(dict.fromkeys(part for part in (category or "").split("/") if part))


def query_from_dict(data: Any) -> Query:
    """Check a decoded JSON object and convert it to a `Query`. An integer `id` becomes a string.

    Raises:
        RecordError: not an object, an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise RecordError(f"expected an object with the keys of a query, found {short_repr(data)}")
    if unknown := sorted(set(data) - _KEYS):
        raise RecordError(f"unknown key {unknown[0]!r}; a query has the keys {', '.join(sorted(_KEYS))}")
    data = {**data, "id": id_text(data.get("id"))} if "id" in data else data
    name, image, question, answer = (_text(data, key) for key in ("id", "image", "question", "answer"))
    answer_type: Any = data.get("answer_type")
    _require(answer_type in ANSWER_TYPES, "'answer_type' must be one of yes_no, short, open", answer_type)
    regions = [] if data.get("regions") is None else data["regions"]
    _require(isinstance(regions, list), "'regions' must be a list of objects", regions)
    return Query(
        name,
        image,
        question,
        answer,
        answer_type,
        objects=_texts(data, "objects"),
        synonyms=_texts(data, "synonyms"),
        absent=_texts(data, "absent"),
        regions=tuple(_region(r, i) for i, r in enumerate(regions)),
        category=None if data.get("category") is None else _text(data, "category"),
        wrong_answers=None if data.get("wrong_answers") is None else _texts(data, "wrong_answers"),
    )


def id_text(value: Any) -> Any:
    """Convert an integer id to a string; return any other value unchanged."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def short_repr(value: Any) -> str:
    """`repr` of a value, at most 60 characters, for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _require(is_valid: bool, expected: str, value: Any, where: str = "") -> None:
    if not is_valid:
        raise RecordError(f"{where}{expected}, found {short_repr(value)}")


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value.strip():
        found = short_repr(value) if key in data else "no such key"
        raise RecordError(f"'{key}' must be a non-empty string, found {found}")
    return _check_characters(value, key)


def _check_characters(value: str, key: str) -> str:
    # JSON allows both, file names and UTF-8 files do not.
    if _SURROGATE.search(value):
        raise RecordError(f"'{key}' holds half of a surrogate pair: {short_repr(value)}")
    if "\0" in value:
        raise RecordError(f"'{key}' holds a null character: {short_repr(value)}")
    return value


def _texts(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = [] if data.get(key) is None else data[key]
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise RecordError(f"'{key}' must be a list of non-empty strings, found {short_repr(value)}")
    return tuple(_check_characters(v, key) for v in value)


def _region(data: Any, index: int) -> Region:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    where = f"'regions'[{index}]"
    is_object = isinstance(data, Mapping) and isinstance(data.get("label"), str)
    _require(is_object, " must be an object with a 'label' and a 'box'", data, where)
    if unknown := sorted(set(data) - {"label", "box", "mask", "score"}):
        raise RecordError(f"{where} has the unknown key {unknown[0]!r}; a region has label, box, mask, score")
    box: Any
    box, mask, score = (data.get(key) for key in ("box", "mask", "score"))
    is_box = isinstance(box, list | tuple) and len(box) == 4 and all(is_number(v) for v in box)
    _require(is_box, ": 'box' must be four finite numbers [x0, y0, x1, y1]", box, where)
    x0, y0, x1, y1 = (float(v) for v in box)
    _require(x1 > x0 and y1 > y0, ": 'box' must have x1 > x0 and y1 > y0", box, where)
    if mask and isinstance(mask, Mapping) and all(value is None for value in mask.values()):
        mask = None  # as Parquet stores a region without a mask beside one with a mask
    is_mask = mask is None or (isinstance(mask, Mapping) and {"size", "counts"} <= set(mask))
    _require(is_mask, ": 'mask' must be a COCO RLE with 'size' and 'counts'", mask, where)
    if mask is None and (x1 - x0) * (y1 - y0) < MIN_BOX:
        raise RecordError(
            f"{where}: 'box' {SMALL_BOX}, found {short_repr(box)}: boxes are in pixels of the image; is it normalised to [0, 1], or in "
            "percent?"
        )
    is_score = score is None or (is_number(score) and 0 <= score <= 1)
    _require(is_score, ": 'score' must be a number in [0, 1]", score, where)
    return Region(data["label"], (x0, y0, x1, y1), mask, score)
