"""Confidence levels: the mapping from a perturbation to the confidence to state."""

import copy
import math
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_calibration.perturbation.level_accuracy import AnswerTypeFit, group_means, spread_strengths
from vlm_calibration.perturbation.level_table import (
    AnswerTypeCounts,
    LevelTable,
    read_likelihoods,
    read_table,
)

NOISE = "noise"
"""The paper's kind of perturbation: diffusion noise, whose strength is its step as a share of the schedule."""


class Perturbation(NamedTuple):
    """What happens to the evidence in an image.

    Attributes:
        kind: a name of `KIND_NAMES`; "" for an untouched image.
        strength: in [0, 1]; 0 leaves the image as it is, 1 leaves nothing of the object.
    """

    kind: str
    strength: float

    def __str__(self) -> str:
        """In words: "motion blur, strength 0.4"; "untouched"."""
        return f"{self.kind.replace('_', ' ')}, strength {self.strength:g}" if self.strength else "untouched"


CLEAN = Perturbation("", 0.0)
"""An untouched image."""


class ConfidenceLevels(ABC):
    """A finite set of strengths for each kind of perturbation, with a confidence for each."""

    @abstractmethod
    def strengths(self, kind: str) -> tuple[float, ...]:
        """The strengths of a kind in rising order; the first is 0, the untouched image. ValueError for an unknown kind."""

    @abstractmethod
    def confidence(self, perturbation: Perturbation, answer_type: str, query_id: str | None = None) -> float:
        """The confidence in [0, 1] after a perturbation of any strength; a ValueError if it is not known.

        `query_id` is the query, for levels that depend on it; None: the average over queries.
        """

    @abstractmethod
    def confidences(self, answer_type: str) -> tuple[float, ...]:
        """All confidences at `strengths`, over all kinds and queries, in falling order."""

    def check_content(self, query_id: str, content: Callable[[], int]) -> None:  # noqa: B027  (optional)
        """ValueError if levels that depend on the query were not measured on its question and image.

        `content` gives the digest of question and image, `QuerySource.content_digest`.
        """

    @property
    def averaged(self) -> "ConfidenceLevels":
        """The same levels without their dependence on the query."""
        return self


@dataclass(frozen=True)
class LinearLevels(ConfidenceLevels):
    """The paper's levels: evenly spaced strengths 0, ..., 1 of any kind, each with the confidence `1 - strength`.

    Args:
        n_levels: number of levels, at least 2; 11 gives 100%, 90%, ..., 0%.
    """

    n_levels: int = 11

    def __post_init__(self) -> None:
        if self.n_levels < 2:
            raise ValueError(f"need n_levels >= 2, got {self.n_levels}")

    def strengths(self, kind: str = NOISE) -> tuple[float, ...]:
        return tuple(i / (self.n_levels - 1) for i in range(self.n_levels))

    def confidence(
        self, perturbation: Perturbation, answer_type: str = "", query_id: str | None = None
    ) -> float:
        """`1 - strength`, exactly for the levels' own strengths; the same for all kinds, answer types and queries."""
        _check_strength(perturbation.strength, 1.0)
        last = self.n_levels - 1
        step = round(perturbation.strength * last)
        return (last - step) / last if perturbation.strength == step / last else 1.0 - perturbation.strength

    def confidences(self, answer_type: str = "") -> tuple[float, ...]:
        return self.strengths()[::-1]


class AnchoredLevels(ConfidenceLevels):
    """Levels with the base model's measured accuracy, per answer type, kind and strength of perturbation.

    A fit makes the accuracies fall with the strength of each kind (`fit_kinds`); between measured strengths they are
    interpolated linearly. The levels' own strengths are chosen so that these accuracies are evenly spread (`spread_strengths`).
    `accuracy` is the fit; `confidence` rounds it to a grid, ties up: a model learns few, round targets more easily.

    `groups` reduces the number of targets without rounding: the accuracies at the levels' strengths, and as often those of
    untouched images, are split into groups that differ least from their means (`group_means`), and each states its mean.

    A clean image is not a certain one. With `likelihoods` the accuracy is that of queries whose own answer the base model holds
    similarly likely on the untouched image, so a hard untouched image gets a low confidence. Where other queries are asked
    untouched alone (`absent: clean`), an untouched image has the accuracy of both together.

    Args:
        path: a JSON file written by `save`; alternative to `table`.
        table: the measurements; alternative to `path`.
        grid: percent between two confidences; divides 100.
        groups: maximum number of confidences per answer type; None: as many as the grid allows.
        likelihoods: the file of the training queries' likelihoods that `vlm-calibration levels fit` writes beside the table; None:
            levels do not depend on the query.

    Raises:
        ValueError: neither or both of `path` and `table` are given, a file cannot be used (see `LevelTable.check_usable`),
            `grid` does not divide 100, `groups` is below 1, or the likelihoods are those of another model or prompt.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        table: LevelTable | None = None,
        grid: int = 5,
        groups: int | None = None,
        likelihoods: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1 or 100 % grid:
            raise ValueError(f"grid must be a whole number of percent that divides 100, got {grid!r}")
        if groups is not None and groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        if path is not None and table is None:
            self.table, self.source = read_table(Path(path)), os.fspath(path)
        elif path is None and table is not None:
            self.table, self.source = table, "the level table"
        else:
            raise ValueError("AnchoredLevels needs either a path or a table")
        self.grid = grid
        self.groups = groups
        self.likelihoods = None if likelihoods is None else os.fspath(likelihoods)
        self._likelihoods = None
        if likelihoods is not None:
            self._likelihoods = read_likelihoods(Path(likelihoods), self.table.provenance, self.source)
        self._fits = {answer_type: AnswerTypeFit(counts) for answer_type, counts in self.table.counts.items()}
        first, *_ = fits = list(self._fits.values())
        self._strengths = {
            kind: spread_strengths(first.strengths[kind], [fit.pooled.perturbed[kind] for fit in fits])
            for kind in self.table.kinds
        }
        self._groups = {answer_type: self._group(fit) for answer_type, fit in self._fits.items()}

    @classmethod
    def fit(
        cls,
        counts: Mapping[str, AnswerTypeCounts],
        *,
        provenance: Mapping[str, Any] | None = None,
        grid: int = 5,
    ) -> "AnchoredLevels":
        """Create levels from measurements by answer type, see `LevelTable`."""
        return cls(table=LevelTable(dict(counts), dict(provenance or {})), grid=grid)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, atomically; see `LevelTable.save`."""
        self.table.save(Path(path))

    @property
    def answer_types(self) -> tuple[str, ...]:
        """The measured answer types."""
        return tuple(self.table.counts)

    @property
    def averaged(self) -> "AnchoredLevels":
        """The same levels without likelihoods. They state the same groups, so each of their `confidences` is one of these levels."""
        averaged = copy.copy(self)
        averaged.likelihoods = averaged._likelihoods = None
        return averaged

    def strengths(self, kind: str) -> tuple[float, ...]:
        if kind not in self._strengths:
            raise self._not_measured(repr(kind), self.table.kinds)
        return self._strengths[kind]

    def accuracy(self, perturbation: Perturbation, answer_type: str, query_id: str | None = None) -> float:
        """The fitted accuracy in [0, 1], unrounded, interpolated linearly; a ValueError for what was not measured."""
        fit = self._fit(answer_type)
        curves = fit.pooled
        if query_id is not None and self._likelihoods is not None:
            if query_id not in self._likelihoods:
                raise ValueError(
                    f"no likelihood of this query in {self.likelihoods}: write it again with `vlm-calibration levels fit`"
                )
            curves = fit.bins[bisect_right(fit.edges, self._likelihoods[query_id].likelihood)]
        kind, strength = perturbation
        if strength == 0:
            return curves.untouched
        self.strengths(kind)  # raises for a kind that was not measured
        _check_strength(strength, fit.strengths[kind][-1])
        return float(np.interp(strength, fit.strengths[kind], curves.perturbed[kind]))

    def check_content(self, query_id: str, content: Callable[[], int]) -> None:
        if self._likelihoods is not None and self._likelihoods[query_id].content != content():
            raise ValueError(
                f"{self.likelihoods} has the likelihood of another question or image under this id: measure it again with "
                "`vlm-calibration levels fit --overwrite`"
            )

    def confidence(self, perturbation: Perturbation, answer_type: str, query_id: str | None = None) -> float:
        """`accuracy`, or with `groups` the mean of its group, rounded to the grid."""
        return self._stated(self.accuracy(perturbation, answer_type, query_id), answer_type)

    def confidences(self, answer_type: str) -> tuple[float, ...]:
        values = self._values(self._fit(answer_type))
        return tuple(sorted({self._stated(v, answer_type) for v in values}, reverse=True))

    def _stated(self, accuracy: float, answer_type: str) -> float:
        groups = self._groups[answer_type]
        value = next((mean for lower, mean in groups if accuracy >= lower), accuracy)
        cells = 100 // self.grid
        # The small term rounds interpolated ties up despite floating-point error.
        return math.floor(value * cells + 0.5 + 1e-9) / cells

    def _group(self, fit: AnswerTypeFit) -> list[tuple[float, float]]:
        """The lower boundary and the mean of each group, in falling order; empty without groups.

        The boundary between two groups is midway between their nearest members.
        """
        if self.groups is None:
            return []
        values = self._values(fit, balanced=True)
        means = group_means(values, self.groups)
        boundaries = [(smallest + max(v for v in values if v < smallest)) / 2 for smallest, _ in means[:-1]]
        return [(lower, mean) for lower, (_, mean) in zip([*boundaries, 0.0], means, strict=True)]

    def _values(self, fit: AnswerTypeFit, balanced: bool = False) -> list[float]:
        """The accuracies at the levels' strengths, over all kinds, of all queries together and, with likelihoods, of all bins.

        Rounded, so that accuracies that are equal but for floating-point errors are one. If `balanced`, untouched images count
        as often as perturbed ones, as in our presets.
        """
        values = []
        for kind, strengths in self._strengths.items():
            for curves in [fit.pooled] if self._likelihoods is None else [fit.pooled, *fit.bins]:
                perturbed = np.interp(strengths[1:], fit.strengths[kind], curves.perturbed[kind])
                curve = [round(float(v), 9) for v in (curves.untouched, *perturbed)]
                values += curve + curve[:1] * (len(curve) - 2 if balanced else 0)
        return values

    def _fit(self, answer_type: str) -> AnswerTypeFit:
        if answer_type not in self._fits:
            raise self._not_measured(f"answer type {answer_type!r}", self.answer_types)
        return self._fits[answer_type]

    def _not_measured(self, name: str, measured: tuple[str, ...]) -> ValueError:
        return ValueError(
            f"{self.source} has no levels for {name}; measured: {', '.join(measured)}: measure it with `vlm-calibration levels fit`"
        )


def _check_strength(strength: float, last: float) -> None:
    if not 0 <= strength <= last:
        raise ValueError(f"strength must be in [0, {last:g}], got {strength!r}")
