"""The images that a report shows: as the model saw them, noise included, loaded anew from the data of the run.

Noise is a function of (seed, epoch, query id), so the configuration alone brings it back.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.files import first_line
from vlm_calibration.records import DataError
from vlm_calibration.reporting.report_data import System
from vlm_calibration.reporting.report_figures import data_uri

LARGEST = 320
"""Pixels of a thumbnail's longer side."""
SMALL = 128
"""Images up to this size are kept to the last pixel."""


def thumbnails(system: System, predictions: Sequence[EstimatedPrediction]) -> tuple[dict[str, str], str]:
    """Thumbnails of the images behind some predictions.

    Returns:
        Query id -> data URI, and why images are missing, empty if none is.
    """
    try:
        dataset = _dataset(system.config)
        place = {query.id: i for i, query in enumerate(dataset.queries)}
        found = {}
        for prediction in predictions:
            if prediction.id not in place:
                continue
            sample = dataset[0, place[prediction.id]]
            # Another policy than that of the run would show another noise.
            if (prediction.question, prediction.noise_step) == (sample.query.question, sample.step):
                found[prediction.id] = thumbnail(sample.image)
    except (DataError, ArgumentError, OSError, ValueError, TypeError, ImportError) as error:
        return {}, f"The images could not be loaded: {first_line(error)}"
    missing = len(predictions) - len(found)
    return found, f"{missing} of the images are not those of the data as it is now." if missing else ""


def thumbnail(image: np.ndarray) -> str:
    """An image, uint8 [H, W, 3], as a data URI, its longer side at most `LARGEST` pixels."""
    picture = Image.fromarray(image)
    small = max(picture.size) <= SMALL
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if small:
        picture.save(out, format="PNG", optimize=True)
    else:
        picture.save(out, format="JPEG", quality=85)
    return data_uri("image/png" if small else "image/jpeg", out.getvalue())


def _dataset(config: Mapping[str, Any] | None) -> Any:
    """The data set that was answered, by the configuration of the run.

    Raises:
        DataError: there is no configuration, or it has no such data.
    """
    from vlm_calibration.data.module import PerturbedQueryDataModule

    if not config or not isinstance(config.get("data"), Mapping):
        raise DataError("there is no config.yaml with the data beside the predictions")
    base = ((config.get("model") or {}).get("init_args") or {}).get("base") or {}
    # The command line fills these in from the model.
    linked = {"processor": base.get("name_or_path"), "revision": base.get("revision")}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PerturbedQueryDataModule, "data")
    # Code that comes with a checkpoint is not run for a picture.
    settings = parser.parse_object({"data": {**config["data"], **linked, "trust_remote_code": False}})
    data = parser.instantiate_classes(settings).data
    tested = data.test is not None
    data.setup("test" if tested else "validate")
    return data.test_set if tested else data.val_dataloader().dataset
