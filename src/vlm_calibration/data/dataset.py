"""The dataset that loads and noises queries when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.utils.data import Dataset

from vlm_calibration.data.noise import NoisePolicy, Sample, perturb_query
from vlm_calibration.data.sources.base import QuerySource
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


class PerturbedQueries(Dataset[Sample]):
    """Queries of one or several parts; `dataset[epoch, index]` is the query's `Sample` in that epoch.

    Where parts have names, a query's id and category get the part's name in front.
    """

    def __init__(self, parts: Mapping[str, Part], policy: NoisePolicy, image_processor: Any) -> None:
        self.policy = policy
        self.image_processor = image_processor
        self.items: list[tuple[Part, Query, int | None]] = []
        for name, part in parts.items():
            for query in part.source.queries():
                if policy.absent == "skip" and not part.source.has_evidence(query):
                    continue
                named = _named(query, name)
                self.items += [(part, q, step) for q, step in _steps(named, part, policy)]
        if not self.items:
            raise DataError(
                "no query is left: with `absent: skip`, records need regions of the objects asked about"
            )

    @property
    def queries(self) -> list[Query]:
        return [query for _, query, _ in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        part, query, step = self.items[index]
        loaded = part.source.load(query)
        try:
            wrong = part.source.wrong_answers(query)
            return perturb_query(query, loaded, self.policy, self.image_processor, epoch, step, wrong)
        except ValueError as error:
            raise DataError(f"record {query.id!r}: {error}") from error


def _steps(query: Query, part: Part, policy: NoisePolicy) -> list[tuple[Query, int | None]]:
    """The query with each noise step it is asked at; None: drawn when it is asked."""
    if part.noise == "every_step":
        return [(replace(query, id=f"{query.id}@{step}"), step) for step in policy.levels.steps]
    return [(query, None if part.noise == "drawn" else 0)]


def _named(query: Query, part: str) -> Query:
    if not part:
        return query
    category = f"{part}/{query.category}" if query.category else part
    return replace(query, id=f"{part}:{query.id}", category=category)
