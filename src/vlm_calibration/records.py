"""The project's nouns: what is asked (`Query`), where its evidence is (`Region`), and what was answered (`Prediction`).

A record is a plain frozen dataclass that is checked once, when it is read, so that everything behind it can trust it.
The keys are those of the files that users write and read: one JSON object a line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

AnswerType = Literal["yes_no", "short", "open"]
ANSWER_TYPES: tuple[str, ...] = get_args(AnswerType)


class RecordError(ValueError):
    """A record that cannot be used. The message names the field, what was found and what was expected."""


class DataError(ValueError):
    """Data that a run cannot go on with. The message is one line that names the file, line or record and the cause."""


@dataclass(frozen=True)
class Region:
    """A part of an image.

    Attributes:
        label: what is there, e.g. "dog".
        box: (x0, y0, x1, y1) in pixels of the original image, x1 and y1 exclusive.
        mask: COCO run-length encoding, {"size": [height, width], "counts": ...}; None: the whole box.
        score: the detector's confidence in [0, 1], None where a person or a renderer drew the region.
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
        image: path of the image relative to the data root (or the source's own name for it).
        question, answer: as text, without any mention of confidence.
        answer_type: how the answer is graded.
        objects: phrases for the key objects, those the question is about. Regions with one of these labels are the
            query's evidence (see `text.labels.is_evidence`), all others are distractors; without `objects`, every region
            is evidence.
        regions: where objects are.
        category: a name to break results down by; "a/b" counts in a, in b and in a/b (see `category_groups`).
        synonyms: further answers that count as right.
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


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one query; the keys of `predictions.jsonl`.

    Attributes:
        answer: the gold answer. text: the output as generated. predicted: the parsed answer, None if there is none.
        confidence: as stated, in [0, 1]; None where none could be read.
        noise_step: diffusion step of the region noise, 0 for a clean image; None where noise does not apply.
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_KEYS = frozenset(f.name for f in fields(Query))
_SURROGATE = re.compile("[\ud800-\udfff]")


class LoadedImage(NamedTuple):
    """A query's pixels and regions, ready to be perturbed.

    image: uint8 [H, W, 3] RGB. evidence: bool [H, W] masks of the objects asked about; distractors: of the others.
    clipped: whether a part of a region lies outside the image.
    """

    image: np.ndarray
    evidence: tuple[np.ndarray, ...]
    distractors: tuple[np.ndarray, ...]
    clipped: bool = False


def category_groups(category: str | None) -> tuple[str, ...]:
    """Every group that a category counts in: its parts, and their combinations in order.

    >>> category_groups("shifted/existence")
    ('shifted', 'existence', 'shifted/existence')
    """
    parts = dict.fromkeys(part for part in (category or "").split("/") if part)
    return tuple("/".join(c) for size in range(1, len(parts) + 1) for c in combinations(parts, size))


def query_from_dict(data: Any) -> Query:
    """Check a decoded JSON object and make a `Query` of it; a whole number as `id` is taken as its digits.

    Raises:
        RecordError: not an object, an unknown or missing key, or a value of the wrong kind.
    """
    if not isinstance(data, Mapping):
        raise RecordError(f"expected an object with the keys of a query, found {_show(data)}")
    if unknown := sorted(set(data) - _KEYS):
        raise RecordError(f"unknown key {unknown[0]!r}; a query has the keys {', '.join(sorted(_KEYS))}")
    data = {**data, "id": id_text(data.get("id"))} if "id" in data else data
    text = {key: _text(data, key) for key in ("id", "image", "question", "answer")}
    answer_type = data.get("answer_type")
    if answer_type not in ANSWER_TYPES:
        raise RecordError(
            f"'answer_type' must be one of {', '.join(ANSWER_TYPES)}, found {_show(answer_type)}"
        )
    category = None if data.get("category") is None else _text(data, "category")
    regions = [] if data.get("regions") is None else data["regions"]
    if not isinstance(regions, list):
        raise RecordError(f"'regions' must be a list of objects, found {_show(regions)}")
    return Query(
        **text,
        answer_type=answer_type,
        objects=_texts(data, "objects"),
        regions=tuple(_region(r, i) for i, r in enumerate(regions)),
        category=category,
        synonyms=_texts(data, "synonyms"),
    )


def id_text(value: Any) -> Any:
    """A whole number as its digits, since files have ids of both kinds; anything else as it is."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value.strip():
        found = _show(value) if key in data else "no such key"
        raise RecordError(f"'{key}' must be a non-empty string, found {found}")
    return _unicode(value, key)


def _unicode(value: str, key: str) -> str:
    # JSON can state both, but no file name or UTF-8 file can hold them.
    if _SURROGATE.search(value):
        raise RecordError(f"'{key}' holds half of a surrogate pair: {_show(value)}")
    if "\0" in value:
        raise RecordError(f"'{key}' holds a null character: {_show(value)}")
    return value


def _texts(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = [] if data.get(key) is None else data[key]
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise RecordError(f"'{key}' must be a list of non-empty strings, found {_show(value)}")
    return tuple(_unicode(v, key) for v in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _region(data: Any, index: int) -> Region:
    where = f"'regions'[{index}]"
    if not isinstance(data, Mapping) or not isinstance(data.get("label"), str):
        raise RecordError(f"{where} must be an object with a 'label' and a 'box', found {_show(data)}")
    if unknown := sorted(set(data) - {"label", "box", "mask", "score"}):
        raise RecordError(f"{where} has the unknown key {unknown[0]!r}; a region has label, box, mask, score")
    box = data.get("box")
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(v) for v in box):
        raise RecordError(f"{where}: 'box' must be four finite numbers [x0, y0, x1, y1], found {_show(box)}")
    x0, y0, x1, y1 = (float(v) for v in box)
    if x1 <= x0 or y1 <= y0:
        raise RecordError(f"{where}: 'box' must have x1 > x0 and y1 > y0, found {_show(box)}")
    mask = data.get("mask")
    if mask is not None and not (isinstance(mask, Mapping) and {"size", "counts"} <= set(mask)):
        raise RecordError(f"{where}: 'mask' must be a COCO RLE with 'size' and 'counts', found {_show(mask)}")
    score = data.get("score")
    if score is not None and not (_is_number(score) and 0 <= score <= 1):
        raise RecordError(f"{where}: 'score' must be a number in [0, 1], found {_show(score)}")
    return Region(data["label"], (x0, y0, x1, y1), mask, score)
