"""Level tables: how often the base model is correct by answer type, kind and strength of perturbation, and its own certainty.

`levels fit` writes a table, `AnchoredLevels` teaches from it. A table holds counts only; `level_accuracy` fits accuracies to them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, norm

from vlm_calibration.files import parse_json, write_text

FORMAT = "vlm_calibration.levels/3"

SIGNIFICANCE = 0.05
FREE_GUESS = 0.05
"""Assumed accuracy of a blind guess for answers other than yes/no; our choice."""
GRADING_ADVICE = ", or grade by another rule (data.grading: contains or token_f1), or rank open answers with a rejected one (data.grading.rank_levels)"


class LevelCount(NamedTuple):
    """Accuracy of the base model at one strength.

    Attributes:
        strength: of the perturbation, in [0, 1]; 0 is the untouched image.
        n: number of held-out queries.
        n_correct: number of correct answers.
    """

    strength: float
    n: int
    n_correct: int


KindCounts = Mapping[str, tuple[LevelCount, ...]]
"""Kind of perturbation -> counts by rising strength. The first is that of untouched images, the same for all kinds."""


@dataclass(frozen=True)
class AnswerTypeCounts:
    """The counts of one answer type, in bins of the base model's likelihood of its own answer to the untouched image.

    A query is counted once at each strength, so the counts of `bins` are about the same queries at every strength.

    Args:
        bins: the counts of each bin, in rising order of the likelihood; all have the same kinds and strengths.
        edges: likelihoods in [0, 1] between the bins; a likelihood equal to an edge belongs to the bin above it.
        never_perturbed: for each bin (0, n, n_correct) of further queries, asked untouched alone, as are those about absent objects
            under `absent: clean`; empty: there are none.

    Raises:
        ValueError: no counts, impossible counts, kinds that differ between bins, strengths that are repeated, outside [0, 1],
            without 0, or different between bins, or edges that do not rise within [0, 1].
    """

    bins: tuple[KindCounts, ...]
    edges: tuple[float, ...] = ()
    never_perturbed: tuple[LevelCount, ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple({kind: _ordered(rows) for kind, rows in counts.items()} for counts in self.bins)
        object.__setattr__(self, "bins", ordered)
        object.__setattr__(self, "edges", tuple(map(float, self.edges)))
        others = tuple(LevelCount(0.0, _whole(n), _whole(correct)) for _, n, correct in self.never_perturbed)
        others = others or (LevelCount(0.0, 0, 0),) * len(ordered)
        object.__setattr__(self, "never_perturbed", others)
        if not ordered or not ordered[0]:
            raise ValueError("no counts")
        edges = [0.0, *self.edges, 1.0]
        if len(self.edges) != len(ordered) - 1 or not all(a <= b for a, b in pairwise(edges)):
            raise ValueError(
                f"{len(ordered)} bins need as many edges less one, rising in [0, 1], found {list(self.edges)}"
            )
        if len(others) != len(ordered) or not all(0 <= row.n_correct <= row.n for row in others):
            raise ValueError(f"impossible counts of queries that are never perturbed: {others}")
        if len(set(self.edges)) < len(self.edges):
            raise ValueError(f"edges are repeated: {list(self.edges)}")
        for counts in ordered:
            for kind, rows in counts.items():
                _check_rows(kind, rows)
            if _strengths(counts) != _strengths(ordered[0]):
                raise ValueError("bins were measured at different kinds or strengths")
            if len({rows[0] for rows in counts.values()}) > 1:
                raise ValueError("kinds have different counts of untouched images")

    @classmethod
    def of_kinds(cls, counts: Mapping[str, Sequence[Sequence[float]]]) -> "AnswerTypeCounts":
        """Counts in a single bin: kind -> rows (strength, n, n_correct)."""
        return cls((counts,))  # type: ignore[arg-type]

    @property
    def pooled(self) -> KindCounts:
        """The counts of all bins together."""
        return {
            kind: tuple(
                LevelCount(rows[0].strength, sum(r.n for r in rows), sum(r.n_correct for r in rows))
                for rows in zip(*(counts[kind] for counts in self.bins), strict=True)
            )
            for kind in self.bins[0]
        }

    @property
    def merged(self) -> "AnswerTypeCounts":
        """The counts of all bins as one."""
        others = [sum(column) for column in zip(*self.never_perturbed, strict=True)]
        return AnswerTypeCounts((self.pooled,), (), (LevelCount(*others),))

    @property
    def untouched(self) -> tuple[LevelCount, ...]:
        """For each bin the counts of all its queries on untouched images."""
        rows = zip(
            (next(iter(counts.values()))[0] for counts in self.bins), self.never_perturbed, strict=True
        )
        return tuple(LevelCount(0.0, a.n + b.n, a.n_correct + b.n_correct) for a, b in rows)


def _ordered(rows: Sequence[Sequence[float]]) -> tuple[LevelCount, ...]:
    return tuple(sorted(LevelCount(float(s), _whole(n), _whole(correct)) for s, n, correct in rows))


def _whole(count: float) -> int:
    if not float(count).is_integer():
        raise ValueError(f"a count must be a whole number, found {count!r}")
    return int(count)


def _strengths(counts: KindCounts) -> dict[str, list[float]]:
    return {kind: [row.strength for row in rows] for kind, rows in counts.items()}


def _check_rows(kind: str, rows: Sequence[LevelCount]) -> None:
    strengths = [row.strength for row in rows]
    if not strengths or strengths[0] != 0 or not all(0 <= strength <= 1 for strength in strengths):
        raise ValueError(
            f"counts of {kind!r} must begin at strength 0, the untouched image, and end at 1 or below; got {strengths}"
        )
    if len(set(strengths)) != len(strengths):
        raise ValueError(f"counts of {kind!r} repeat a strength: {strengths}")
    for row in rows:
        if row.n < 1 or not 0 <= row.n_correct <= row.n:
            raise ValueError(f"impossible count of {kind!r}: {row}")


@dataclass(frozen=True)
class LevelTable:
    """Measured counts and their provenance.

    Args:
        counts: answer type -> its counts; all answer types have the same kinds and strengths.
        provenance: origin of the counts: model, schedule, seed, number of queries, ...

    Raises:
        ValueError: no counts, or kinds or strengths that differ between answer types.
    """

    counts: Mapping[str, AnswerTypeCounts]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.counts:
            raise ValueError("a level table needs counts for at least one answer type")
        first, *others = self.counts
        for other in others:
            if _strengths(self.counts[other].bins[0]) != _strengths(self.counts[first].bins[0]):
                raise ValueError(
                    f"answer types {first!r} and {other!r} were measured with different kinds or strengths of perturbation"
                )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The measured kinds of perturbation."""
        return tuple(next(iter(self.counts.values())).bins[0])

    @property
    def ranked(self) -> bool:
        """Whether the counts of open answers rank given answers, and grade no generated ones."""
        return "ranking" in self.provenance.get("grading", {}).values()

    def check_usable(self) -> None:
        """Refuse counts from which no useful confidence can be learned.

        Every answer type must pass two one-sided tests at the 5% level: a binomial test that the accuracy on untouched images
        exceeds a blind guess (1/2 for yes/no and ranking, 1/20 for other answers, our choice), and for each kind of
        perturbation a Cochran-Armitage test that accuracy falls with the strength. The second test is conservative, since the
        same queries are asked at every strength.

        Raises:
            ValueError: a test fails; names the answer type, the kind, its counts and what to do.
        """
        for answer_type, counts in self.counts.items():
            by_ranking = self.ranked and answer_type == "open"
            guess = 0.5 if answer_type == "yes_no" or by_ranking else FREE_GUESS
            (clean,) = counts.merged.untouched
            for kind, rows in counts.pooled.items():
                reason = _why_unusable(kind, clean, rows, guess)
                if reason is None:
                    continue
                shown = ", ".join(f"{row.n_correct}/{row.n} at {row.strength:g}" for row in rows)
                advice = "" if answer_type == "yes_no" or by_ranking else GRADING_ADVICE
                raise ValueError(
                    f"{answer_type} answers teach no confidence: {reason} (correct, by strength of {kind}: {shown}); measure more "
                    f"or other queries, ask with another prompt (data.prompt){advice}"
                )

    def save(self, path: Path) -> None:
        """Write the table as JSON, atomically.

        Raises:
            DataError: the file cannot be written.
        """
        answer_types = {
            answer_type: {
                "likelihood_edges": list(counts.edges),
                "kinds": {
                    kind: [
                        {
                            "strength": s[0].strength,
                            "n": [r.n for r in s],
                            "n_correct": [r.n_correct for r in s],
                        }
                        for s in zip(*(by_kind[kind] for by_kind in counts.bins), strict=True)
                    ]
                    for kind in self.kinds
                },
                "never_perturbed": {
                    "n": [r.n for r in counts.never_perturbed],
                    "n_correct": [r.n_correct for r in counts.never_perturbed],
                },
            }
            for answer_type, counts in self.counts.items()
        }
        content = {"format": FORMAT, "provenance": dict(self.provenance), "answer_types": answer_types}
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _why_unusable(kind: str, clean: LevelCount, rows: Sequence[LevelCount], guess: float) -> str | None:
    """Which test the counts fail; None if they pass."""
    if guess**clean.n > SIGNIFICANCE:
        needed = math.ceil(math.log(SIGNIFICANCE) / math.log(guess))
        return f"{clean.n} clean queries are too few, at least {needed} are needed"
    if binomtest(clean.n_correct, clean.n, guess, "greater").pvalue > SIGNIFICANCE:
        return (
            f"the base model is correct on {clean.n_correct} of {clean.n} clean images, not significantly more than the "
            f"{guess:.0%} of a blind guess"
        )
    if trend_p_value(rows) > SIGNIFICANCE:
        return (
            f"{kind} does not significantly lower the base model's accuracy: leave it out of data.noise.kinds"
        )
    return None


def trend_p_value(rows: Sequence[LevelCount]) -> float:
    """One-sided p-value of the Cochran-Armitage test that accuracy falls with the strength (Armitage, 1955)."""
    strengths, n, correct = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    mean = correct.sum() / n.sum()
    centred = strengths - np.average(strengths, weights=n)
    variance = mean * (1 - mean) * (n * centred**2).sum()
    return (
        float(norm.cdf((centred * (correct - n * mean)).sum() / math.sqrt(variance))) if variance > 0 else 1.0
    )


def read_table(path: Path) -> LevelTable:
    """Read a level table that `LevelTable.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a level table, or not a usable one (`LevelTable.check_usable`).
    """
    if not path.is_file():
        raise FileNotFoundError(f"no level table at {path}; write one with `vlm-calibration levels fit`")
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(
                f"expected a JSON object with format {FORMAT!r}, found {found!r}: measure it again with `vlm-calibration levels fit`"
            )
        table = LevelTable(
            {kind: _read_counts(value) for kind, value in content["answer_types"].items()},
            content["provenance"],
        )
        if not isinstance(table.provenance.get("grading", {}), dict):
            raise ValueError("'grading' must be an object of rules by answer type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"missing key {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a level table: {reason}") from error
    try:
        table.check_usable()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return table


def _read_counts(content: Mapping[str, Any]) -> AnswerTypeCounts:
    edges, kinds, others = content["likelihood_edges"], content["kinds"], content["never_perturbed"]
    n_bins = len(edges) + 1
    every = [others, *(row for rows in kinds.values() for row in rows)]
    if any(len(row[key]) != n_bins for row in every for key in ("n", "n_correct")):
        raise ValueError(f"every count must have {n_bins} bins, one more than there are likelihood_edges")
    bins = tuple(
        {
            kind: tuple(LevelCount(row["strength"], row["n"][i], row["n_correct"][i]) for row in rows)
            for kind, rows in kinds.items()
        }
        for i in range(n_bins)
    )
    return AnswerTypeCounts(
        bins,
        tuple(edges),
        tuple(LevelCount(0.0, others["n"][i], others["n_correct"][i]) for i in range(n_bins)),
    )
