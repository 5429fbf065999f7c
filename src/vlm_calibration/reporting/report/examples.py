"""The answers that a report shows one by one, with the images as the model saw them, perturbation included.

Images are loaded from the data of the run. The perturbation is a function of (seed, epoch, query id), so the configuration reproduces it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.files import first_line
from vlm_calibration.perturbation.levels import Perturbation
from vlm_calibration.records import DataError
from vlm_calibration.reporting.report.data import System
from vlm_calibration.reporting.report.figures import data_uri

MAX_EXAMPLES = 8
THUMBNAIL_SIDE = 320
"""Pixels of a thumbnail's longer side."""
PIXEL_ART_SIDE = 128
"""Images up to this size are stored losslessly, as PNG."""


class Example(NamedTuple):
    """An answer as the page shows it.

    Attributes:
        answer: the prediction.
        perturbation: what happened to the image, in words; empty if that is not known.
        others: name of another system -> its output.
    """

    answer: EstimatedPrediction
    perturbation: str
    others: dict[str, str]


class Examples(NamedTuple):
    """The examples of a report, at most one an image.

    Attributes:
        overconfident: the most confident wrong answers.
        underconfident: the least confident correct answers.
    """

    overconfident: list[Example]
    underconfident: list[Example]

    @property
    def predictions(self) -> list[EstimatedPrediction]:
        """The predictions behind all examples."""
        return [example.answer for example in (*self.overconfident, *self.underconfident)]


def examples_of(system: System, others: Sequence[System]) -> Examples:
    """Choose the most confident wrong answers and the least confident correct ones."""
    confident = [p for p in system.predictions if p.confidence is not None]
    wrong = _first([p for p in confident if not p.correct], lambda p: -(p.confidence or 0.0))
    correct = _first([p for p in confident if p.correct], lambda p: p.confidence or 0.0)
    return Examples(*([_example(p, others) for p in chosen] for chosen in (wrong, correct)))


def _first(
    predictions: Sequence[EstimatedPrediction], key: Callable[[EstimatedPrediction], float]
) -> list[EstimatedPrediction]:
    """The first predictions in the order of `key`, one an image."""
    by_image: dict[str, EstimatedPrediction] = {}
    for prediction in sorted(predictions, key=lambda p: (key(p), p.id)):
        by_image.setdefault(prediction.image or prediction.id, prediction)
    return list(by_image.values())[:MAX_EXAMPLES]


def _example(prediction: EstimatedPrediction, others: Sequence[System]) -> Example:
    kind, strength = prediction.perturbation, prediction.strength
    words = "" if kind is None or strength is None else str(Perturbation(kind, strength))
    texts = {s.name: s.by_id[prediction.id].text for s in others if prediction.id in s.by_id}
    return Example(prediction, words, texts)


# --- Images ---------------------------------------------------------------------------------------------------------


def thumbnails(system: System, predictions: Sequence[EstimatedPrediction]) -> tuple[dict[str, str], str]:
    """Make thumbnails of the images behind some predictions.

    Returns:
        Query id -> data URI, and why images are missing, empty if none is.
    """
    try:
        dataset = _dataset(system.config, predictions)
        index = {query.id: i for i, query in enumerate(dataset.queries)}
        images = {}
        for prediction in predictions:
            if prediction.id not in index:
                continue
            sample = dataset[0, index[prediction.id]]
            # With another noise policy than the run's, the image would be perturbed in another way.
            shown = (sample.query.question, *sample.perturbation)
            if (prediction.question, prediction.perturbation, prediction.strength) == shown:
                images[prediction.id] = thumbnail(sample.image)
    except (DataError, ArgumentError, OSError, ValueError, TypeError, ImportError) as error:
        return {}, f"The images could not be loaded: {first_line(error)}"
    missing = len(predictions) - len(images)
    return (
        images,
        f"{missing} of the images are missing: the data have changed since the run." if missing else "",
    )


def thumbnail(image: np.ndarray) -> str:
    """Encode an image, uint8 [H, W, 3], as a data URI, its longer side at most `THUMBNAIL_SIDE` pixels."""
    picture = Image.fromarray(image)
    lossless = max(picture.size) <= PIXEL_ART_SIDE
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if lossless:
        picture.save(file, format="PNG", optimize=True)
    else:
        picture.save(file, format="JPEG", quality=85)
    return data_uri("image/png" if lossless else "image/jpeg", file.getvalue())


def _dataset(config: Mapping[str, Any] | None, predictions: Sequence[EstimatedPrediction]) -> Any:
    """The data set that a run answered, built from the run's configuration.

    Raises:
        DataError: there is no configuration, or it has no such data.
    """
    from vlm_calibration.data.module import PerturbedQueryDataModule

    if not config or not isinstance(config.get("data"), Mapping):
        raise DataError("there is no config.yaml with the data beside the predictions")
    base = ((config.get("model") or {}).get("init_args") or {}).get("base") or {}
    # The command line links these settings to the model's.
    linked = {"processor": base.get("name_or_path"), "revision": base.get("revision")}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PerturbedQueryDataModule, "data")
    # Never run code that comes with a checkpoint only to show images.
    settings = parser.parse_object({"data": {**config["data"], **linked, "trust_remote_code": False}})
    data = parser.instantiate_classes(settings).data
    # A stage of training may have a test set in its configuration as well, and it answers the validation set.
    prefixes = tuple(f"{name}:" if name else "" for name in data.test or ())
    is_test = bool(prefixes) and all(p.id.startswith(prefixes) for p in predictions)
    data.setup("test" if is_test else "validate")
    return data.sets["test"] if is_test else data.sets["validation"]
