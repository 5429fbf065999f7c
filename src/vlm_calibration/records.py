"""The records that the whole project passes around, checked once, when they are read; fields are the keys of the JSON lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails, SchemaValidator

AnswerType = Literal["yes_no", "short", "open"]
ANSWER_TYPES: tuple[str, ...] = get_args(AnswerType)
MIN_BOX = 9
"""Smallest area of a region's box, in pixels; a perturbation of less is not seen."""
VERBALIZED = "verbalized"
"""Name of the stated confidence among estimators; its key in a file is `confidence`."""
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
        box: (x0, y0, x1, y1) in pixels of the original image, x1 and y1 exclusive; at least `MIN_BOX` pixels without a mask.
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
        objects: phrases for the key objects. Regions with one of these labels are evidence (see `text.labels.is_evidence`), all
            others distractors; without `objects`, every region is evidence.
        category: group for breaking down results; "a/b" counts in a and in b (see `category_groups`).
        synonyms: further correct answers.
        absent: objects that the answer says are not in the image; if empty, `text.labels.absent_objects` reads them from the question.
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
        answer: the gold answer.
        text: the generated text.
        predicted: the answer parsed from the text; None if there is none.
        confidence: the stated confidence in [0, 1]; None if it could not be parsed.
        correct: whether the prediction matches the gold answer.
        noise_step: diffusion step of noise, 0 for an untouched image; None for other kinds or if unknown.
        answer_type: how the answer was graded.
        perturbation: kind of perturbation of the evidence, "" for an untouched image; None if unknown.
        strength: of the perturbation, in [0, 1], 0 for an untouched image; None if unknown.
        image: the query's image, as its source names it; None if a file lacks it.
        estimates: further estimator -> confidence in [0, 1], or None; each is a key of its own in `predictions.jsonl`.
        probes: probe, or `ORIGINAL` -> the confidence read after it, in [0, 1], or None; without probes no key of the file.
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
    image: str | None = None
    estimates: Mapping[str, float | None] = field(default_factory=dict)
    probes: Mapping[str, float | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("estimates", "probes")}
        probes = {"probes": dict(self.probes)} if self.probes else {}
        return {**own, **self.estimates, **probes}

    def confidence_of(self, estimator: str) -> float | None:
        """KeyError for an unknown estimator."""
        return self.confidence if estimator == VERBALIZED else self.estimates[estimator]


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
    """The groups that a category counts in: its parts, in order and each once; "a/b" in ("a", "b")."""
    return tuple(dict.fromkeys(part for part in (category or "").split("/") if part))


def query_from_dict(data: Any) -> Query:
    """Convert a decoded JSON object to a `Query`, an integer `id` to a string; a RecordError names what is wrong with it."""
    from pydantic_core import ValidationError

    try:
        return query_validator().validate_python(data)
    except ValidationError as error:
        # An unknown key may be a misspelt one, which is then missing as well.
        first = min(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
        raise RecordError(_explained(first)) from error


@cache
def query_validator() -> SchemaValidator:
    """Converts JSON, decoded or not, to a `Query`, or raises a ValueError, which `query_from_dict` explains."""
    from pydantic_core import SchemaValidator, core_schema  # slow, and most commands read no query

    def expect(words: str, schema: Any) -> Any:
        return core_schema.custom_error_schema(schema, "expected", custom_error_message=f"must be {words}")

    def converted(function: Any, schema: Any) -> Any:
        return core_schema.no_info_after_validator_function(function, schema)

    def record(kind: type, **schemas: Any) -> Any:
        keys = []
        for member in fields(kind):
            schema = schemas[member.name]
            if member.default is not MISSING:
                schema = core_schema.with_default_schema(schema, default=member.default)
            keys.append(core_schema.dataclass_field(member.name, schema))
        arguments = core_schema.dataclass_args_schema(kind.__name__, keys, extra_behavior="forbid")
        return core_schema.dataclass_schema(kind, arguments, list(schemas))

    # JSON allows null characters and halves of surrogate pairs, file names and UTF-8 files do not.
    string = core_schema.str_schema(strict=True, pattern=r"^[^\x00]*[^\s\x00\x1c-\x1f][^\x00]*$")
    identifier = core_schema.union_schema([string, converted(str, core_schema.int_schema(strict=True))])
    text = expect("a non-empty string of valid characters", string)
    phrases = core_schema.tuple_variable_schema(core_schema.str_schema(strict=True, pattern=r"^[^\x00]+$"))
    phrases = converted(lambda given: given or (), core_schema.nullable_schema(phrases))
    phrases = expect("a list of non-empty strings of valid characters", phrases)
    box = core_schema.tuple_schema([core_schema.float_schema(strict=True, allow_inf_nan=False)] * 4)
    # A whole number stays one, since digests of queries depend on it.
    kinds: Any = (core_schema.int_schema, core_schema.float_schema)
    score = core_schema.union_schema([kind(strict=True, ge=0, le=1) for kind in kinds], mode="left_to_right")
    region = record(
        Region,
        label=core_schema.str_schema(strict=True),
        box=expect("four finite numbers [x0, y0, x1, y1]", box),
        mask=core_schema.nullable_schema(core_schema.dict_schema()),
        score=expect("a number in [0, 1]", core_schema.nullable_schema(score)),
    )
    regions = core_schema.nullable_schema(
        core_schema.list_schema(converted(_checked_region, region), strict=True)
    )
    query = record(
        Query,
        id=expect("a non-empty string of valid characters", identifier),
        image=text,
        question=text,
        answer=text,
        answer_type=expect(f"one of {', '.join(ANSWER_TYPES)}", core_schema.literal_schema([*ANSWER_TYPES])),
        objects=phrases,
        regions=converted(lambda v: tuple(v or ()), regions),
        category=core_schema.nullable_schema(text),
        synonyms=phrases,
        absent=phrases,
        wrong_answers=core_schema.nullable_schema(phrases),
    )
    return SchemaValidator(query)


def _checked_region(region: Region) -> Region:
    (x0, y0, x1, y1), mask = region.box, region.mask
    if not (x1 > x0 and y1 > y0):
        raise ValueError(f"'box' must have x1 > x0 and y1 > y0, found {region.box}")
    if mask is not None and not {"size", "counts"} <= set(mask):
        raise ValueError(f"'mask' must be a COCO RLE with 'size' and 'counts', found {short_repr(mask)}")
    if mask is not None and mask["size"] is mask["counts"] is None:
        # As Parquet stores a region without a mask beside one with a mask.
        mask, region = None, replace(region, mask=None)
    if mask is None and (x1 - x0) * (y1 - y0) < MIN_BOX:
        raise ValueError(
            f"'box' {SMALL_BOX}, found {region.box}: boxes are in pixels of the image; is it normalised to [0, 1], or in percent?"
        )
    return region


def _explained(error: ErrorDetails) -> str:
    """What is wrong with a record, in words that name the key: "'regions[0].box' must be ..."."""
    kind, path = error["type"], error["loc"]
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    keys = ", ".join(f.name for f in fields(Region if path[:1] == ("regions",) else Query))
    if kind == "unexpected_keyword_argument":
        return f"unknown key {key!r}; there are {keys}"
    if kind == "dataclass_type":
        return f"{key} expected an object with the keys {keys}, found {short_repr(error['input'])}".lstrip()
    if kind == "missing":
        return f"{key!r} is missing"
    if kind == "value_error":
        return f"{key!r}: {error['ctx']['error']}"
    return f"{key!r} {error['msg'].removeprefix('Input ')}, found {short_repr(error['input'])}"


def id_text(value: Any) -> Any:
    """Convert an integer id to a string; return any other value unchanged."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def short_repr(value: Any) -> str:
    """`repr` of a value, at most 60 characters, for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
