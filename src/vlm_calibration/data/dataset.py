"""The dataset that loads and noises queries when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from vlm_calibration.data.noise import NoisePolicy, Sample, perturb_query
from vlm_calibration.data.sources.base import LazyQueries, QuerySource
from vlm_calibration.records import DataError, Query


@dataclass(frozen=True)
class Part:
    """A named part of an evaluation.

    Args:
        source: its queries.
        noise: "none" leaves the images as they are; "drawn" noises each query at the step that the noise policy draws;
            "every_step" asks each query once at every step of the policy's levels.
    """

    source: QuerySource
    noise: Literal["none", "drawn", "every_step"] = "none"


@dataclass(frozen=True)
class _Section:
    """The queries of one part: those at `chosen` of `queries` (None: all), each at every one of `steps`."""

    name: str
    part: Part
    queries: Sequence[Query]
    chosen: np.ndarray | None
    steps: Sequence[int | None]

    def __len__(self) -> int:
        return (len(self.queries) if self.chosen is None else len(self.chosen)) * len(self.steps)

    def item(self, index: int) -> tuple[Query, int | None]:
        """The query at this place, by its full name, and its noise step."""
        place, at = divmod(index, len(self.steps))
        query = named(self.queries[place if self.chosen is None else int(self.chosen[place])], self.name)
        step = self.steps[at]
        return (replace(query, id=f"{query.id}@{step}") if self.part.noise == "every_step" else query), step


class PerturbedQueries(Dataset[Sample]):
    """Queries of one or several parts; `dataset[epoch, index]` is the query's `Sample` in that epoch.

    Where parts have names, a query's id and category get the part's name in front.
    """

    def __init__(self, parts: Mapping[str, Part], policy: NoisePolicy, image_processor: Any) -> None:
        self.parts = dict(parts)
        self.policy = policy
        self.image_processor = image_processor
        self._sections = [_section(name, part, policy) for name, part in parts.items()]
        self._ends = list(accumulate(len(section) for section in self._sections))
        if not len(self):
            raise DataError(
                "no query is left: with `absent: skip`, records need regions of the objects asked about"
            )

    def is_noised(self, query_id: str) -> bool:
        """Whether the policy noises the part that has the query of this id."""
        return any(
            query_id.startswith(f"{name}:" if name else "")
            for name, part in self.parts.items()
            if part.noise != "none"
        )

    @property
    def queries(self) -> Sequence[Query]:
        return LazyQueries(len(self), lambda index: self._item(index)[1])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _item(self, index: int) -> tuple[Part, Query, int | None]:
        which = next(i for i, end in enumerate(self._ends) if index < end)
        section = self._sections[which]
        query, step = section.item(index - (self._ends[which] - len(section)))
        return section.part, query, step

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        part, query, step = self._item(index)
        loaded = part.source.load(query)
        try:
            wrong = part.source.wrong_answers(query)
            return perturb_query(query, loaded, self.policy, self.image_processor, epoch, step, wrong)
        except ValueError as error:
            raise DataError(f"record {query.id!r}: {error}") from error


def _section(name: str, part: Part, policy: NoisePolicy) -> _Section:
    queries = part.source.queries()
    chosen = None
    if policy.absent == "skip":
        has = np.fromiter((part.source.has_evidence(q) for q in queries), bool, len(queries))
        chosen = np.flatnonzero(has)
    # None: drawn when the query is asked.
    steps: dict[str, Sequence[int | None]] = {
        "every_step": policy.levels.steps,
        "drawn": [None],
        "none": [0],
    }
    return _Section(name, part, queries, chosen, steps[part.noise])


def named(query: Query, part: str) -> Query:
    """A part's query as an evaluation knows it: id and category with the part's name in front, if it has one."""
    if not part:
        return query
    category = f"{part}/{query.category}" if query.category else part
    return replace(query, id=f"{part}:{query.id}", category=category)
