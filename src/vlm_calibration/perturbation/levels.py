"""Confidence levels: the mapping from a perturbation to the confidence to state.

`LinearLevels` is the paper's mapping: the confidence falls linearly with the strength. `AnchoredLevels` states the base model's
measured accuracy, per answer type, kind and strength, since a yes/no question is answered correctly half of the time even if
the object is invisible; and, if it knows how likely the base model holds its answer to an untouched image, for this very image.
"""

import copy
import math
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_calibration.perturbation.answer_likelihoods import read_likelihoods
from vlm_calibration.perturbation.level_accuracy import (
    Accuracies,
    fit_bins,
    fit_pooled,
    fit_untouched,
    group_means,
    spread_strengths,
)
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelTable, read_table

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


def check_confidence(confidence: float) -> float:
    """Convert a confidence to float; ValueError if it is outside [0, 1] or NaN."""
    value = float(confidence)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"confidence must be in [0, 1], got {confidence!r}")
    return value


def nominal_step(confidence: float, total_steps: int) -> int:
    """The paper's noise step for a confidence in [0, 1]: `round((1 - confidence) * total_steps)`."""
    return round((1.0 - check_confidence(confidence)) * total_steps)


class ConfidenceLevels(ABC):
    """A finite set of strengths for each kind of perturbation, with a confidence for each."""

    @abstractmethod
    def strengths(self, kind: str) -> tuple[float, ...]:
        """The strengths of a kind in rising order; the first is 0, the untouched image. ValueError for an unknown kind."""

    @abstractmethod
    def confidence(self, perturbation: Perturbation, answer_type: str, query_id: str | None = None) -> float:
        """The confidence in [0, 1] after a perturbation.

        Args:
            perturbation: its strength need not be one of `strengths`.
            answer_type: type of the answer.
            query_id: the query, for levels that depend on it; None: the average over queries.

        Raises:
            ValueError: levels are not known for this.
        """

    @abstractmethod
    def confidences(self, answer_type: str) -> tuple[float, ...]:
        """All confidences at `strengths`, over all kinds and queries, in falling order."""

    def check_content(self, query_id: str, content: Callable[[], int]) -> None:  # noqa: B027  (optional)
        """Check that levels that depend on the query were measured on its question and image.

        Args:
            query_id: the query.
            content: gives the digest of its question and image, `QuerySource.content_digest`.

        Raises:
            ValueError: they were measured on another one.
        """

    @property
    def averaged(self) -> "ConfidenceLevels":
        """The same levels without their dependence on the query."""
        return self


@dataclass(frozen=True)
class LinearLevels(ConfidenceLevels):
    """The paper's levels: evenly spaced strengths 0, ..., 1 of any kind, each with the confidence `1 - strength`.

    Args:
        n_levels: number of levels; 11 gives 100%, 90%, ..., 0%.

    Raises:
        ValueError: fewer than two levels.
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
        strengths = self.strengths()
        if perturbation.strength in strengths:
            last = self.n_levels - 1
            return (last - strengths.index(perturbation.strength)) / last
        return 1.0 - perturbation.strength

    def confidences(self, answer_type: str = "") -> tuple[float, ...]:
        last = self.n_levels - 1
        return tuple((last - i) / last for i in range(self.n_levels))


class AnchoredLevels(ConfidenceLevels):
    """Levels with the base model's measured accuracy, per answer type, kind and strength of perturbation.

    A fit makes the accuracies fall with the strength of each kind (`fit_kinds`); between measured strengths they are
    interpolated linearly. The levels' own strengths are chosen so that these accuracies are evenly spread (`spread_strengths`).
    `accuracy` is the fit; `confidence` rounds it to a grid, ties up. The default grid of 5% gives few, round targets: a model
    learns "85%" more easily than 101 near-synonymous numbers, and accuracies measured on a few hundred queries are no finer.
    The rounding error is at most half a grid step (2.5%), 1.25% on average; `grid=1` states the accuracies themselves.

    `groups` reduces the number of targets without that bias: the accuracies at the levels' strengths, and as often those of untouched
    images, are split into groups that differ least from their means (`group_means`), and each states its mean.

    A clean image is not a certain one. With `likelihoods` the accuracy is that of queries whose own answer the base model holds
    similarly likely on the untouched image, so a hard untouched image gets a low confidence.

    Accuracies fall with the strength from that of the same queries untouched. Where other queries are asked untouched alone
    (`absent: clean`), an untouched image has the accuracy of both together.

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
        if (path is None) == (table is None):
            raise ValueError("AnchoredLevels needs either a path or a table")
        if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1 or 100 % grid:
            raise ValueError(f"grid must be a whole number of percent that divides 100, got {grid!r}")
        if groups is not None and groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        if path is not None:
            table = read_table(Path(path))
        self.source = "the level table" if path is None else os.fspath(path)
        assert table is not None  # for the type checker: one of the two was given
        self.table = table
        self.grid = grid
        self.groups = groups
        self.likelihoods = None if likelihoods is None else os.fspath(likelihoods)
        self._likelihoods = (
            None
            if likelihoods is None
            else read_likelihoods(Path(likelihoods), table.provenance, self.source)
        )
        self._fits = {kind: _Fit(counts) for kind, counts in table.counts.items()}
        self._strengths = {kind: self._spread(kind) for kind in table.kinds}
        self._groups = {answer_type: self._group(answer_type) for answer_type in self._fits}

    @classmethod
    def fit(
        cls,
        counts: Mapping[str, AnswerTypeCounts],
        *,
        provenance: Mapping[str, Any] | None = None,
        grid: int = 5,
    ) -> "AnchoredLevels":
        """Create levels from measurements: answer type -> its counts; `provenance` and `grid` as in `LevelTable` and the constructor."""
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
        self._check_kind(kind)
        return self._strengths[kind]

    def accuracy(self, perturbation: Perturbation, answer_type: str, query_id: str | None = None) -> float:
        """The fitted accuracy in [0, 1], unrounded, interpolated linearly between measured strengths.

        Args:
            perturbation: what happened to the image.
            answer_type: type of the answer.
            query_id: a query with a known likelihood; None: all queries together.

        Raises:
            ValueError: a kind, an answer type or a query that was not measured, or a strength above the measured ones.
        """
        fit = self._fit(answer_type)
        curves = fit.pooled
        if query_id is not None and self._likelihoods is not None:
            if query_id not in self._likelihoods:
                raise ValueError(
                    f"no likelihood of this query in {self.likelihoods}: write it again with `vlm-calibration levels fit`"
                )
            curves = fit.bins[bisect_right(fit.edges, self._likelihoods[query_id].likelihood)]
        if perturbation.strength == 0:
            return curves.untouched
        kind = perturbation.kind
        self._check_kind(kind)
        _check_strength(perturbation.strength, fit.strengths[kind][-1])
        return float(np.interp(perturbation.strength, fit.strengths[kind], curves.perturbed[kind]))

    def check_content(self, query_id: str, content: Callable[[], int]) -> None:
        if self._likelihoods is not None and self._likelihoods[query_id].content != content():
            raise ValueError(
                f"{self.likelihoods} has the likelihood of another question or image under this id: measure it again with "
                "`vlm-calibration levels fit --overwrite`"
            )

    def confidence(self, perturbation: Perturbation, answer_type: str, query_id: str | None = None) -> float:
        """`accuracy`, or with `groups` the mean of its group, rounded to the grid.

        Raises:
            ValueError: as `accuracy`.
        """
        return self._stated(self.accuracy(perturbation, answer_type, query_id), answer_type)

    def confidences(self, answer_type: str) -> tuple[float, ...]:
        fit = self._fit(answer_type)
        return tuple(sorted({self._stated(v, answer_type) for v in self._values(fit)}, reverse=True))

    def _stated(self, accuracy: float, answer_type: str) -> float:
        value = accuracy
        if self.groups is not None:
            groups = self._groups[answer_type]
            # The boundary between two groups is midway between their nearest members.
            value = next((mean for lower, mean in groups if accuracy >= lower), groups[-1][1])
        cells = 100 // self.grid
        # The small term rounds interpolated ties up despite floating-point error.
        return math.floor(value * cells + 0.5 + 1e-9) / cells

    def _group(self, answer_type: str) -> list[tuple[float, float]]:
        """The lower boundary and the mean of each group, in falling order; empty without groups."""
        if self.groups is None:
            return []
        values = self._values(self._fit(answer_type), balanced=True)
        means = group_means(values, self.groups)
        boundaries = []
        for smallest, _ in means[:-1]:
            below = max(v for v in values if v < smallest)
            boundaries.append((smallest + below) / 2)
        return [(lower, mean) for lower, (_, mean) in zip([*boundaries, 0.0], means, strict=True)]

    def _spread(self, kind: str) -> tuple[float, ...]:
        fits = list(self._fits.values())
        return spread_strengths(fits[0].strengths[kind], [fit.pooled.perturbed[kind] for fit in fits])

    def _values(self, fit: "_Fit", balanced: bool = False) -> list[float]:
        """The accuracies at the levels' strengths, over all kinds, of all queries together and, with likelihoods, of all bins.

        Rounded, so that accuracies that are equal but for floating-point errors are one.

        Args:
            fit: the accuracies of an answer type.
            balanced: untouched images count as often as perturbed ones, as in our presets.
        """
        values = []
        for kind, strengths in self._strengths.items():
            for curves in [fit.pooled] if self._likelihoods is None else [fit.pooled, *fit.bins]:
                perturbed = np.interp(strengths[1:], fit.strengths[kind], curves.perturbed[kind])
                curve = [round(float(v), 9) for v in (curves.untouched, *perturbed)]
                values += curve + curve[:1] * (len(curve) - 2 if balanced else 0)
        return values

    def _fit(self, answer_type: str) -> "_Fit":
        if answer_type not in self._fits:
            raise ValueError(
                f"{self.source} has no levels for answer type {answer_type!r}; measured: {', '.join(self.answer_types)}: measure it "
                "with `vlm-calibration levels fit`"
            )
        return self._fits[answer_type]

    def _check_kind(self, kind: str) -> None:
        if kind not in self.table.kinds:
            raise ValueError(
                f"{self.source} has no levels for {kind!r}; measured: {', '.join(self.table.kinds)}: measure it with "
                "`vlm-calibration levels fit`"
            )

    def __repr__(self) -> str:
        return (
            f"AnchoredLevels({', '.join(self.answer_types)}; {', '.join(self.table.kinds)}; grid={self.grid})"
        )


class _Curves(NamedTuple):
    """Fitted accuracies.

    Attributes:
        untouched: on untouched images, of all queries.
        perturbed: by kind and strength, of the queries that are perturbed.
    """

    untouched: float
    perturbed: Accuracies


class _Fit:
    """The fitted accuracies of one answer type.

    Attributes:
        strengths: kind -> its measured strengths.
        pooled: over all queries.
        bins: in each bin of the likelihood.
        edges: likelihoods between the bins.
    """

    def __init__(self, counts: AnswerTypeCounts) -> None:
        self.strengths: Mapping[str, Sequence[float]] = {
            kind: [row.strength for row in rows] for kind, rows in counts.bins[0].items()
        }
        (self.pooled,) = _curves([fit_pooled(counts)], counts.merged)
        self.bins = _curves(fit_bins(counts), counts)
        self.edges = counts.edges


def _curves(fits: Sequence[Accuracies], counts: AnswerTypeCounts) -> list[_Curves]:
    return list(map(_Curves, fit_untouched(fits, counts).tolist(), fits))


def _check_strength(strength: float, last: float) -> None:
    if not 0 <= strength <= last:
        raise ValueError(f"strength must be in [0, {last:g}], got {strength!r}")
