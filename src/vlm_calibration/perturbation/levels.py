"""Confidence levels: the mapping from a perturbation to the confidence to state, and its fit to the counts of a level table."""

import copy
import math
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from scipy.optimize import isotonic_regression

from vlm_calibration.perturbation.level_table import (
    AnswerTypeCounts,
    LevelTable,
    read_likelihoods,
    read_table,
)
from vlm_calibration.perturbation.noise import check_share

T = TypeVar("T")

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


class ConfidenceLevels(ABC):
    """A finite set of strengths for each kind of perturbation, with a confidence for each."""

    @abstractmethod
    def strengths(self, kind: str) -> tuple[float, ...]:
        """The strengths of a kind in rising order, from 0, the untouched image; ValueError for an unknown kind."""

    @abstractmethod
    def confidence(self, perturbation: Perturbation, answer_type: str, query_id: str | None = None) -> float:
        """The confidence in [0, 1] after a perturbation, of a query or the average (None); a ValueError if it is not known."""

    @abstractmethod
    def confidences(self, answer_type: str) -> tuple[float, ...]:
        """All confidences at `strengths`, over all kinds and queries, in falling order."""

    def check_content(self, query_id: str, content: Callable[[], int]) -> None:  # noqa: B027  (optional)
        """ValueError if the query's levels were measured on another question or image than `QuerySource.content_digest` tells."""

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
        """`1 - strength`, exactly for the levels' own strengths."""
        check_share("strength", perturbation.strength)
        last = self.n_levels - 1
        step = round(perturbation.strength * last)
        return (last - step) / last if perturbation.strength == step / last else 1.0 - perturbation.strength

    def confidences(self, answer_type: str = "") -> tuple[float, ...]:
        return self.strengths()[::-1]


class AnchoredLevels(ConfidenceLevels):
    """Levels with the base model's measured accuracy, per answer type, kind and strength of perturbation.

    A fit makes the accuracies fall with the strength of each kind (`fit_kinds`), linearly between the measured strengths; at the
    levels' own strengths they are evenly spread (`spread_strengths`). `confidence` rounds the fit to a grid, ties up: a model learns
    few, round targets more easily. `groups` reduces the targets further: similar accuracies at the levels' strengths state their
    mean (`group_means`).

    With `likelihoods` the accuracy is that of queries whose own answer the base model holds similarly likely on the untouched
    image, so a hard untouched image gets a low confidence. Where other queries are asked untouched alone (`absent: clean`), an
    untouched image has the accuracy of both together.

    Args:
        path: a JSON file written by `save`; alternative to `table`.
        table: the measurements; alternative to `path`.
        grid: percent between two confidences; divides 100.
        groups: maximum number of confidences per answer type; None: as many as the grid allows.
        likelihoods: the file of likelihoods that `vlm-calibration levels fit` writes beside the table; None: all queries are alike.

    Raises:
        ValueError: an invalid `grid` or `groups`, neither or both of `path` and `table`, or a file that cannot be used, such as a
            table that is not usable (`LevelTable.check_usable`) or likelihoods of another model or prompt.
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
        self.grid, self.groups = grid, groups
        self.likelihoods = None if likelihoods is None else os.fspath(likelihoods)
        self._likelihoods = None
        if likelihoods is not None:
            self._likelihoods = read_likelihoods(Path(likelihoods), self.table.provenance, self.source)
        counts = self.table.counts
        self._pooled = {answer_type: fit_curves(each.merged)[0] for answer_type, each in counts.items()}
        self._bins = {answer_type: fit_curves(each) for answer_type, each in counts.items()}
        self._strengths = {
            kind: spread_strengths(measured, [curves.perturbed[kind] for curves in self._pooled.values()])
            for kind, measured in self.table.strengths.items()
        }
        self._groups = {t: group_means(self._values(t, True), groups) if groups else [] for t in counts}

    @classmethod
    def fit(cls, counts: Mapping[str, AnswerTypeCounts], provenance: Mapping[str, Any] | None = None) -> Self:
        return cls(table=LevelTable(counts, provenance or {}))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, atomically."""
        self.table.save(Path(path))

    @property
    def answer_types(self) -> tuple[str, ...]:
        return tuple(self.table.counts)

    @property
    def averaged(self) -> "AnchoredLevels":
        """The same levels without likelihoods, with the same groups: each of their `confidences` is one of these levels."""
        averaged = copy.copy(self)
        averaged.likelihoods = averaged._likelihoods = None
        return averaged

    def strengths(self, kind: str) -> tuple[float, ...]:
        return self._measured(self._strengths, kind, repr(kind))

    def accuracy(self, perturbation: Perturbation, answer_type: str, query_id: str | None = None) -> float:
        """The fitted accuracy in [0, 1], unrounded; a ValueError for what was not measured."""
        curves = self._measured(self._pooled, answer_type, f"answer type {answer_type!r}")
        if query_id is not None and self._likelihoods is not None:
            if query_id not in self._likelihoods:
                problem = f"no likelihood of this query in {self.likelihoods}"
                raise ValueError(f"{problem}: write it again with `vlm-calibration levels fit`")
            edges = self.table.counts[answer_type].edges
            curves = self._bins[answer_type][bisect_right(edges, self._likelihoods[query_id].likelihood)]
        kind, strength = perturbation
        if strength == 0:
            return curves.untouched
        measured = self._measured(self.table.strengths, kind, repr(kind))
        check_share("strength", strength, measured[-1])
        return float(np.interp(strength, measured, curves.perturbed[kind]))

    def check_content(self, query_id: str, content: Callable[[], int]) -> None:
        if self._likelihoods is not None and self._likelihoods[query_id].content != content():
            problem = f"{self.likelihoods} has the likelihood of another question or image under this id"
            raise ValueError(f"{problem}: measure it again with `vlm-calibration levels fit --overwrite`")

    def confidence(self, perturbation: Perturbation, answer_type: str, query_id: str | None = None) -> float:
        """`accuracy`, or with `groups` the mean of its group, rounded to the grid."""
        return self._stated(self.accuracy(perturbation, answer_type, query_id), answer_type)

    def confidences(self, answer_type: str) -> tuple[float, ...]:
        stated = {self._stated(value, answer_type) for value in self._values(answer_type)}
        return tuple(sorted(stated, reverse=True))

    def _stated(self, accuracy: float, answer_type: str) -> float:
        value = next((mean for lower, mean in self._groups[answer_type] if accuracy >= lower), accuracy)
        cells = 100 // self.grid
        # The small term rounds interpolated ties up despite floating-point error.
        return math.floor(value * cells + 0.5 + 1e-9) / cells

    def _values(self, answer_type: str, balanced: bool = False) -> list[float]:
        """The accuracies at the levels' strengths, of all kinds and bins; if `balanced`, with those of untouched images as often."""
        values = []
        pooled = self._measured(self._pooled, answer_type, f"answer type {answer_type!r}")
        bins = [] if self._likelihoods is None else self._bins[answer_type]
        for kind, strengths in self._strengths.items():
            for curves in (pooled, *bins):
                perturbed = np.interp(strengths[1:], self.table.strengths[kind], curves.perturbed[kind])
                # Rounded, so that accuracies that are equal but for floating-point errors are one.
                curve = [round(float(v), 9) for v in (curves.untouched, *perturbed)]
                values += curve + curve[:1] * (len(curve) - 2 if balanced else 0)
        return values

    def _measured(self, values: Mapping[str, T], key: str, name: str) -> T:
        """The value of a kind or answer type, called `name` in the ValueError if it was not measured."""
        if key not in values:
            problem = f"{self.source} has no levels for {name}; measured: {', '.join(values)}"
            raise ValueError(f"{problem}: measure it with `vlm-calibration levels fit`")
        return values[key]


Accuracies = Mapping[str, np.ndarray]
"""Kind of perturbation -> accuracies in [0, 1] by strength, float64; the first is that of untouched images."""


class AccuracyCurves(NamedTuple):
    """Fitted accuracies.

    Attributes:
        untouched: on untouched images, of all queries.
        perturbed: by kind and strength, of the queries that are perturbed.
    """

    untouched: float
    perturbed: Accuracies


def fit_kinds(accuracy: Accuracies, n: Accuracies) -> dict[str, np.ndarray]:
    """Accuracies that fall with the strength of each kind, all from the same value of untouched images: the least-squares fit.

    For a given value at strength 0, the best fit of a kind is its isotonic regression cut off at that value; so that value pools
    with all blocks above it, as in the pool-adjacent-violators algorithm.

    Args:
        accuracy: measured accuracies by kind; the first value is the same for all kinds.
        n: the number of answers behind each.
    """
    chains = {
        kind: isotonic_regression(values[1:], weights=n[kind][1:], increasing=False).x
        if len(values) > 1
        else values[1:]
        for kind, values in accuracy.items()
    }
    first = next(iter(accuracy))
    total, weight = accuracy[first][0] * n[first][0], float(n[first][0])
    blocks = [block for kind, chain in chains.items() for block in zip(chain, n[kind][1:], strict=True)]
    for value, block_weight in sorted(blocks, reverse=True):
        if value <= total / weight:
            break
        total, weight = total + value * block_weight, weight + block_weight
    untouched = total / weight
    fitted = ((kind, [untouched, *np.minimum(chain, untouched)]) for kind, chain in chains.items())
    return {kind: np.clip(values, 0.0, 1.0) for kind, values in fitted}


def fit_bins(counts: AnswerTypeCounts) -> list[dict[str, np.ndarray]]:
    """`fit_kinds` in each bin, after accuracies were made to rise with the likelihood at every strength."""
    accuracy: dict[str, np.ndarray] = {}
    n: dict[str, np.ndarray] = {}
    for kind, rows in counts.kinds.items():
        n[kind] = np.array([row.n for row in rows], dtype=np.float64)  # [strengths, bins]
        measured = np.array([row.n_correct for row in rows]) / n[kind]
        fits = (isotonic_regression(a, weights=w).x for a, w in zip(measured, n[kind], strict=True))
        accuracy[kind] = np.stack(list(fits))
    return [
        fit_kinds({kind: a[:, i] for kind, a in accuracy.items()}, {kind: w[:, i] for kind, w in n.items()})
        for i in range(len(counts.edges) + 1)
    ]


def fit_curves(counts: AnswerTypeCounts) -> list[AccuracyCurves]:
    """The fits of all bins, and the accuracy on untouched images, to which queries that are never perturbed contribute as measured."""
    fits = fit_bins(counts)
    untouched = np.array([next(iter(fit.values()))[0] for fit in fits])
    _, others, others_correct = counts.never_perturbed
    if any(others):
        n = counts.untouched[0].astype(np.float64)
        correct = untouched * (n - others) + others_correct
        untouched = np.asarray(isotonic_regression(correct / n, weights=n).x)
    return list(map(AccuracyCurves, untouched.tolist(), fits))


def spread_strengths(strengths: Sequence[float], accuracies: Sequence[np.ndarray]) -> tuple[float, ...]:
    """As many strengths as were measured, at which accuracies are evenly spaced between untouched images and the lowest one.

    They rise from 0, rounded to a thousandth, and are fewer where several coincide.

    Args:
        strengths: the measured strengths of a kind, rising from 0.
        accuracies: the fitted accuracies of each answer type at these strengths; the mean counts, of each scaled to [0, 1].
    """
    if not (scaled := [(a - a[-1]) / (a[0] - a[-1]) for a in accuracies if a[0] > a[-1]]):
        return tuple(strengths)
    curve = np.mean(scaled, axis=0)
    chosen = [0.0]
    for target in np.linspace(1, 0, len(strengths))[1:]:
        above = int(np.argmax(curve <= target + 1e-12))  # the first strength that falls to the target
        low, high = curve[above], curve[above - 1]
        share = (high - target) / (high - low)
        strength = round(float(strengths[above - 1] + share * (strengths[above] - strengths[above - 1])), 3)
        strength = min(strength, strengths[-1])  # accuracies are not known above it
        if strength > chosen[-1]:
            chosen.append(strength)
    return tuple(chosen)


def group_means(values: Sequence[float], groups: int) -> list[tuple[float, float]]:
    """Split numbers into at most `groups` groups with the least sum of squared differences from their means (Jenks' natural breaks).

    Exact dynamic programming over the distinct values in falling order. Returns the lower boundary and the mean of each group, in falling
    order. A boundary is midway between the nearest members; the last is 0.
    """
    distinct, repeats = (part[::-1] for part in np.unique(values, return_counts=True))
    n = len(distinct)
    sums = (np.concatenate([[0.0], np.cumsum(repeats * distinct**power)]) for power in range(3))
    weight, first, second = (total - total[:, None] for total in sums)  # [begin, end] of a group
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(weight > 0, second - first**2 / weight, math.inf)
    best = np.array([0.0] + [math.inf] * n)  # of the numbers before each end
    starts = []
    for _ in range(min(groups, n)):
        cost = best[:, None] + errors
        starts.append(cost.argmin(axis=0))
        best = cost.min(axis=0)
    means: list[tuple[float, float]] = []
    end = n
    for start in (int(of_group[end]) for of_group in reversed(starts)):
        lower = float(distinct[end - 1] + distinct[end]) / 2 if end < n else 0.0
        means.append((lower, float(np.average(distinct[start:end], weights=repeats[start:end]))))
        end = start
    return means[::-1]
