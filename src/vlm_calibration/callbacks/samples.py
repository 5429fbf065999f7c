"""A table of answers to the same few queries at every validation, each beside the image as the model saw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_calibration.callbacks.media import data_table, photo
from vlm_calibration.data.dataset import PerturbedQueries
from vlm_calibration.records import Prediction

ASKED = ("id", "image", "question", "answer", "noise_step")
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
        taught: whether the noise policy is one that is being taught, and the confidence that it earns is of interest.
    """

    def __init__(
        self, dataset: PerturbedQueries, size: int, processes: int = 1, taught: bool = False
    ) -> None:
        self.dataset = dataset
        self.taught = taught
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
        return data_table([*ASKED, *(["earned_confidence"] if self.taught else []), *said], rows)

    def _asked(self, index: int) -> list[Any]:
        # Evaluations are in epoch 0, whichever epoch of training they follow.
        sample = self.dataset[0, index]
        query = sample.query
        asked = [query.id, photo(sample.image), query.question, query.answer, sample.step]
        return [*asked, sample.confidence] if self.taught else asked


def _said(prediction: Prediction | None) -> list[Any]:
    return [None] * len(SAID) if prediction is None else [getattr(prediction, name) for name in SAID]
