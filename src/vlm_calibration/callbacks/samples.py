"""A W&B table of the answers to a few fixed queries, with the image that the model saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_calibration.callbacks.media import data_table, photo
from vlm_calibration.data.dataset import PerturbedQueries
from vlm_calibration.records import Prediction

QUERY_COLUMNS = ("id", "image", "question", "answer", "perturbation", "strength")
ANSWER_COLUMNS = ("text", "confidence", "correct")


def spread(length: int, size: int, processes: int) -> list[int]:
    """At most `size` indices of the first process's share of a data set, evenly spaced."""
    own = range(0, length, processes)
    positions = np.linspace(0, len(own) - 1, num=min(size, len(own)))
    return [own[round(position)] for position in positions]


class SampleTable:
    """Collects the answers of systems to a few queries of a data set.

    Args:
        dataset: the data set being answered.
        size: number of queries in the table.
        processes: number of processes that share the data set; the table takes queries of the first one.
        taught: whether to add the confidence that the noise policy assigns, as in training.
    """

    def __init__(
        self, dataset: PerturbedQueries, size: int, processes: int = 1, taught: bool = False
    ) -> None:
        self.dataset = dataset
        self.taught = taught
        self.indices = {dataset.queries[i].id: i for i in spread(len(dataset), size, processes)}
        self.answers: dict[str, dict[str, Prediction]] = {}

    def update(self, system: str, predictions: Sequence[Prediction]) -> None:
        """Keep a system's answers to the queries of the table."""
        answers = {p.id: p for p in predictions if p.id in self.indices}
        if answers:
            self.answers.setdefault(system, {}).update(answers)

    def draw(self) -> Any:
        """The `wandb.Table`: one row an answered query, with the answer of each system.

        The image is noised again, which gives the same pixels.
        """
        systems = list(self.answers)
        columns = [f"{system}_{name}" if system else name for system in systems for name in ANSWER_COLUMNS]
        rows = []
        for query_id, index in self.indices.items():
            answers = [self.answers[system].get(query_id) for system in systems]
            if any(answers):
                rows.append(
                    [*self._query_cells(index), *(cell for p in answers for cell in _answer_cells(p))]
                )
        taught = ["earned_confidence"] if self.taught else []
        return data_table([*QUERY_COLUMNS, *taught, *columns], rows)

    def _query_cells(self, index: int) -> list[Any]:
        # Validation and evaluation use the noise of epoch 0, whatever the epoch of training.
        sample = self.dataset[0, index]
        query = sample.query
        cells = [query.id, photo(sample.image), query.question, query.answer, *sample.perturbation]
        return [*cells, sample.confidence] if self.taught else cells


def _answer_cells(prediction: Prediction | None) -> list[Any]:
    return [None if prediction is None else getattr(prediction, name) for name in ANSWER_COLUMNS]
