"""A table of answers to the same few queries at every validation, each beside the image as the model saw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import wandb
from PIL import Image

from vlm_calibration.data.dataset import PerturbedQueries
from vlm_calibration.records import Prediction

LARGEST_SIDE = 512
"""Pixels that an image is shrunk to for the table, if it is larger."""
ASKED = ("id", "image", "question", "answer", "noise_step", "target_confidence")
SAID = ("text", "confidence", "correct")


def spread(length: int, wanted: int, processes: int) -> list[int]:
    """At most `wanted` indices of the first process's share of a data set, evenly spaced."""
    own = range(0, length, processes)
    places = np.linspace(0, len(own) - 1, num=min(wanted, len(own)))
    return [own[round(place)] for place in places]


class SampleTable:
    """Collects what systems answer to a few queries of a data set.

    Args:
        dataset: what is being answered.
        size: how many queries.
        processes: how many share the queries; those of the first process are taken.
    """

    def __init__(self, dataset: PerturbedQueries, size: int, processes: int = 1) -> None:
        self.dataset = dataset
        self.wanted = {dataset.queries[i].id: i for i in spread(len(dataset), size, processes)}
        self.answers: dict[str, dict[str, Prediction]] = {}

    def update(self, system: str, predictions: Sequence[Prediction]) -> None:
        """Keep what this system answered to the queries of the table."""
        kept = {p.id: p for p in predictions if p.id in self.wanted}
        if kept:
            self.answers.setdefault(system, {}).update(kept)

    def draw(self) -> Any:
        """A `wandb.Table`: a row a query that was answered, and for each system what it said.

        The image is noised anew, which gives the very same one.
        """
        systems = list(self.answers)
        said = [f"{system}_{name}" if system else name for system in systems for name in SAID]
        rows = []
        for query_id, index in self.wanted.items():
            found = [self.answers[system].get(query_id) for system in systems]
            if any(found):
                rows.append([*self._asked(index), *(cell for p in found for cell in _said(p))])
        return wandb.Table(columns=[*ASKED, *said], data=rows)

    def _asked(self, index: int) -> list[Any]:
        # Evaluations are in epoch 0, whichever epoch of training they follow.
        sample = self.dataset[0, index]
        query = sample.query
        picture = wandb.Image(shown(sample.image), file_type="jpg")
        return [query.id, picture, query.question, query.answer, sample.step, sample.confidence]


def shown(image: np.ndarray) -> Image.Image:
    """A uint8 [H, W, 3] image, shrunk if it is larger than `LARGEST_SIDE`."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return picture


def _said(prediction: Prediction | None) -> list[Any]:
    return [None] * len(SAID) if prediction is None else [getattr(prediction, name) for name in SAID]
