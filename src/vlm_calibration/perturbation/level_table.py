"""What `levels fit` measures, and the two files that it writes for `AnchoredLevels`; pyarrow, slow to import, is imported where it is used."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, norm

from vlm_calibration.files import parse_json, replacing, write_text

FORMAT = "vlm_calibration.levels/3"
LIKELIHOODS_FORMAT = "vlm_calibration.likelihoods/2"
COMPARED = ("weights", "prompt", "max_pixels")
"""Keys of the provenance that likelihoods and their level table must share."""

SIGNIFICANCE = 0.05
FREE_GUESS = 0.05
"""Assumed accuracy of a blind guess for answers other than yes/no; our choice."""
MEASURE_AGAIN = "measure it again with `vlm-calibration levels fit`"


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
        ValueError: no counts, impossible counts, kinds or strengths that differ between bins, strengths that do not begin at 0, are
            repeated or above 1, or edges that do not rise within [0, 1].
    """

    bins: tuple[KindCounts, ...]
    edges: tuple[float, ...] = ()
    never_perturbed: tuple[LevelCount, ...] = ()

    def __post_init__(self) -> None:
        bins = tuple(
            {kind: tuple(sorted(_count(kind, row) for row in rows)) for kind, rows in counts.items()}
            for counts in self.bins
        )
        edges = tuple(map(float, self.edges))
        others = tuple(_count("no kind", (0, *row[1:]), least=0) for row in self.never_perturbed)
        others = others or (LevelCount(0.0, 0, 0),) * len(bins)
        for name, value in (("bins", bins), ("edges", edges), ("never_perturbed", others)):
            object.__setattr__(self, name, value)
        if not bins or not bins[0]:
            raise ValueError("no counts")
        rising = all(a < b for a, b in pairwise(edges)) and all(0 <= edge <= 1 for edge in edges)
        if not len(edges) + 1 == len(bins) == len(others) or not rising:
            raise ValueError(
                f"{len(bins)} bins need as many edges less one, rising in [0, 1], found {list(edges)}"
            )
        for kind, strengths in _strengths(bins[0]).items():
            if strengths[:1] != [0] or not strengths[-1] <= 1 or len(set(strengths)) < len(strengths):
                raise ValueError(
                    f"counts of {kind!r} must begin at strength 0, the untouched image, repeat none and end at 1 or below; got {strengths}"
                )
        for counts in bins:
            if _strengths(counts) != _strengths(bins[0]):
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
            kind: tuple(_sum(rows) for rows in zip(*(counts[kind] for counts in self.bins), strict=True))
            for kind in self.bins[0]
        }

    @property
    def merged(self) -> "AnswerTypeCounts":
        """The counts of all bins as one."""
        return AnswerTypeCounts((self.pooled,), (), (_sum(self.never_perturbed),))

    @property
    def untouched(self) -> tuple[LevelCount, ...]:
        """For each bin the counts of all its queries on untouched images."""
        perturbed = (next(iter(counts.values()))[0] for counts in self.bins)
        return tuple(map(_sum, zip(perturbed, self.never_perturbed, strict=True)))


def _count(kind: str, row: Sequence[float], least: int = 1) -> LevelCount:
    strength, n, n_correct = row
    if not (float(n).is_integer() and float(n_correct).is_integer() and least <= n >= n_correct >= 0):
        raise ValueError(f"impossible count of {kind!r}: {n_correct} correct of {n}")
    return LevelCount(float(strength), int(n), int(n_correct))


def _sum(rows: Sequence[LevelCount]) -> LevelCount:
    """The counts of several sets of queries at one strength."""
    return LevelCount(rows[0].strength, sum(row.n for row in rows), sum(row.n_correct for row in rows))


def _strengths(counts: KindCounts) -> dict[str, list[float]]:
    return {kind: [row.strength for row in rows] for kind, rows in counts.items()}


@dataclass(frozen=True)
class LevelTable:
    """Measured counts by answer type, of the same kinds and strengths, and their provenance: model, schedule, seed, ..."""

    counts: Mapping[str, AnswerTypeCounts]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.counts:
            raise ValueError("a level table needs counts for at least one answer type")
        first = next(iter(self.counts))
        for other, counts in self.counts.items():
            if _strengths(counts.bins[0]) != self.strengths:
                raise ValueError(
                    f"answer types {first!r} and {other!r} were measured with different kinds or strengths of perturbation"
                )

    @cached_property
    def strengths(self) -> dict[str, list[float]]:
        """Kind of perturbation -> the strengths at which it was measured."""
        return _strengths(next(iter(self.counts.values())).bins[0])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The measured kinds of perturbation."""
        return tuple(self.strengths)

    @property
    def ranked(self) -> bool:
        """Whether the counts of open answers rank given answers, and grade no generated ones."""
        return "ranking" in self.provenance.get("grading", {}).values()

    def check_usable(self) -> None:
        """Refuse counts from which no useful confidence can be learned, with a ValueError that says what to do.

        Every answer type must pass two one-sided tests at the 5% level: a binomial test that the accuracy on untouched images
        exceeds a blind guess (1/2 for yes/no and ranking, 1/20 for other answers, our choice), and for each kind of
        perturbation a Cochran-Armitage test that accuracy falls with the strength. The second test is conservative, since the
        same queries are asked at every strength.
        """
        for answer_type, counts in self.counts.items():
            has_two_answers = answer_type == "yes_no" or (self.ranked and answer_type == "open")
            guess = 0.5 if has_two_answers else FREE_GUESS
            (clean,) = counts.merged.untouched
            for kind, rows in counts.pooled.items():
                if guess**clean.n > SIGNIFICANCE:
                    needed = math.ceil(math.log(SIGNIFICANCE) / math.log(guess))
                    reason = f"{clean.n} clean queries are too few, at least {needed} are needed"
                elif binomtest(clean.n_correct, clean.n, guess, "greater").pvalue > SIGNIFICANCE:
                    reason = (
                        f"the base model is correct on {clean.n_correct} of {clean.n} clean images, not significantly more than "
                        f"the {guess:.0%} of a blind guess"
                    )
                elif trend_p_value(rows) > SIGNIFICANCE:
                    reason = f"{kind} does not significantly lower the base model's accuracy: leave it out of data.noise.kinds"
                else:
                    continue
                shown = ", ".join(f"{row.n_correct}/{row.n} at {row.strength:g}" for row in rows)
                advice = "measure more or other queries, ask with another prompt (data.prompt)"
                if not has_two_answers:
                    advice += (
                        ", or grade by another rule (data.grading: contains or token_f1), or rank open answers with a rejected "
                        "one (data.grading.rank_levels)"
                    )
                raise ValueError(
                    f"{answer_type} answers teach no confidence: {reason} (correct, by strength of {kind}: {shown}); {advice}"
                )

    def save(self, path: Path) -> None:
        """Write the table as JSON, atomically; a DataError if the file cannot be written."""
        answer_types = {}
        for answer_type, counts in self.counts.items():
            by_kind = {kind: zip(*(bin_[kind] for bin_ in counts.bins), strict=True) for kind in self.kinds}
            answer_types[answer_type] = {
                "likelihood_edges": list(counts.edges),
                "kinds": {
                    kind: [{"strength": rows[0].strength, **_by_bin(rows)} for rows in strengths]
                    for kind, strengths in by_kind.items()
                },
                "never_perturbed": _by_bin(counts.never_perturbed),
            }
        content = {"format": FORMAT, "provenance": dict(self.provenance), "answer_types": answer_types}
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _by_bin(rows: Sequence[LevelCount]) -> dict[str, list[int]]:
    return {"n": [row.n for row in rows], "n_correct": [row.n_correct for row in rows]}


def trend_p_value(rows: Sequence[LevelCount]) -> float:
    """One-sided p-value of the Cochran-Armitage test that accuracy falls with the strength (Armitage, 1955)."""
    strengths, n, correct = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    mean = correct.sum() / n.sum()
    centred = strengths - np.average(strengths, weights=n)
    variance = mean * (1 - mean) * (n * centred**2).sum()
    if variance <= 0:
        return 1.0
    return float(norm.cdf((centred * (correct - n * mean)).sum() / math.sqrt(variance)))


def read_table(path: Path) -> LevelTable:
    """Read a level table that `LevelTable.save` wrote; a ValueError if it is none, or not a usable one (`LevelTable.check_usable`)."""
    if not path.is_file():
        raise FileNotFoundError(f"no level table at {path}; write one with `vlm-calibration levels fit`")
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(
                f"expected a JSON object with format {FORMAT!r}, found {found!r}: {MEASURE_AGAIN}"
            )
        counts = {kind: _read_counts(value) for kind, value in content["answer_types"].items()}
        table = LevelTable(counts, content["provenance"])
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
    edges = content["likelihood_edges"]
    kinds = {
        kind: [(row["strength"], row["n"], row["n_correct"]) for row in rows]
        for kind, rows in content["kinds"].items()
    }
    others = content["never_perturbed"]
    lists = [
        others["n"],
        others["n_correct"],
        *(ns for rows in kinds.values() for _, *both in rows for ns in both),
    ]
    n_bins = len(edges) + 1
    if any(len(ns) != n_bins for ns in lists):
        raise ValueError(f"every count must have {n_bins} bins, one more than there are likelihood_edges")
    bins = tuple(
        {kind: [(s, n[i], n_correct[i]) for s, n, n_correct in rows] for kind, rows in kinds.items()}
        for i in range(n_bins)
    )
    never = [(0, *pair) for pair in zip(others["n"], others["n_correct"], strict=True)]
    return AnswerTypeCounts(bins, tuple(edges), tuple(never))  # type: ignore[arg-type]


class Measured(NamedTuple):
    """How likely the base model holds its own answer to a query.

    Attributes:
        likelihood: in [0, 1], in single precision.
        content: digest of the question and the image that it was measured on, in [0, 2^64) (`QuerySource.content_digest`).
    """

    likelihood: float
    content: int


def write_likelihoods(path: Path, likelihoods: Mapping[str, Measured], provenance: Mapping[str, Any]) -> None:
    """Write likelihoods by query id as Parquet, atomically: the columns `id`, `likelihood` and `content`, the provenance as metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {"format": LIKELIHOODS_FORMAT, "provenance": json.dumps({k: provenance[k] for k in COMPARED})}
    columns = {
        "id": pa.array(list(likelihoods), pa.string()),
        "likelihood": pa.array([m.likelihood for m in likelihoods.values()], pa.float32()),
        "content": pa.array([m.content for m in likelihoods.values()], pa.uint64()),
    }
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns, metadata=metadata), temporary, compression="zstd")


def read_likelihoods(path: Path, provenance: Mapping[str, Any], table: str) -> dict[str, Measured]:
    """Read a file of `write_likelihoods`: query id -> what was measured.

    A ValueError if it is none, or was measured with another model or prompt than the level table that has this provenance and is called
    `table` in messages.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(f"no likelihoods at {path}; write them with `vlm-calibration levels fit`")
    try:
        content = pq.read_table(path)
        metadata = content.schema.metadata or {}
        if (found := metadata.get(b"format")) != LIKELIHOODS_FORMAT.encode():
            raise ValueError(f"expected the format {LIKELIHOODS_FORMAT!r}, found {found!r}: {MEASURE_AGAIN}")
        measured = dict(json.loads(metadata[b"provenance"]))
        ids, contents = (content[name].to_pylist() for name in ("id", "content"))
        values = np.asarray(content["likelihood"], dtype=np.float64)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a file of likelihoods: {reason}") from error
    differing = [key for key in COMPARED if measured.get(key) != provenance.get(key)]
    if differing:
        raise ValueError(
            f"{path} and {table} were measured with another {', '.join(differing)}: write both with `vlm-calibration levels fit`"
        )
    if len(values) and not (values.min() >= 0 and values.max() <= 1):  # also refuses NaN
        raise ValueError(f"{path}: likelihoods must be in [0, 1], found {values.min()} to {values.max()}")
    return dict(zip(ids, map(Measured, values.tolist(), contents), strict=True))
