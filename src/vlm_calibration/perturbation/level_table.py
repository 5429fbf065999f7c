"""What `levels fit` measures, and the two files that it writes for `AnchoredLevels`."""

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
MEASURE_AGAIN = "measure it again with `vlm-calibration levels fit`"


class LevelCount(NamedTuple):
    """Answers of the base model at one strength, in each bin of its likelihood of its own answer to the untouched image.

    Attributes:
        strength: of the perturbation, in [0, 1]; 0 is the untouched image.
        n: number of held-out queries in each bin, in rising order of the likelihood.
        n_correct: number of correct answers among them.
    """

    strength: float
    n: tuple[int, ...]
    n_correct: tuple[int, ...]

    @property
    def pooled(self) -> "LevelCount":
        return LevelCount(self.strength, (sum(self.n),), (sum(self.n_correct),))


@dataclass(frozen=True)
class AnswerTypeCounts:
    """The counts of one answer type. A bin has the same queries at every strength.

    Args:
        kinds: kind of perturbation -> a `LevelCount` for each strength; that of 0, the untouched image, is the same for all kinds.
            A single bin may be given as numbers: (strength, n, n_correct).
        edges: likelihoods in [0, 1] between the bins; a likelihood equal to an edge belongs to the bin above it.
        never_perturbed: further queries, asked untouched alone (`absent: clean`); None: there are none.

    Raises:
        ValueError: no counts, impossible counts, strengths that do not begin at 0, are repeated or above 1, or edges that do not rise
            within [0, 1].
    """

    kinds: Mapping[str, tuple[LevelCount, ...]]
    edges: tuple[float, ...] = ()
    never_perturbed: LevelCount = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        edges = tuple(map(float, self.edges))
        none = (0,) * (len(edges) + 1)
        others = _count("no kind", self.never_perturbed or (0, none, none), len(none), least=0)
        kinds = {
            kind: tuple(sorted(_count(kind, row, len(none)) for row in rows))
            for kind, rows in self.kinds.items()
        }
        for name, value in (("kinds", kinds), ("edges", edges), ("never_perturbed", others)):
            object.__setattr__(self, name, value)
        if not kinds:
            raise ValueError("no counts")
        if not all(a < b for a, b in pairwise(edges)) or not all(0 <= edge <= 1 for edge in edges):
            raise ValueError(f"likelihood edges must rise within [0, 1], found {list(edges)}")
        for kind, strengths in self.strengths.items():
            if strengths[:1] != [0] or not strengths[-1] <= 1 or len(set(strengths)) < len(strengths):
                rule = "begin at strength 0, the untouched image, repeat none and end at 1 or below"
                raise ValueError(f"counts of {kind!r} must {rule}; got {strengths}")
        if len({rows[0] for rows in kinds.values()}) > 1:
            raise ValueError("kinds have different counts of untouched images")

    @property
    def strengths(self) -> dict[str, list[float]]:
        """Kind of perturbation -> the measured strengths."""
        return {kind: [row.strength for row in rows] for kind, rows in self.kinds.items()}

    @property
    def merged(self) -> "AnswerTypeCounts":
        """The counts of all bins as one."""
        kinds = {kind: tuple(row.pooled for row in rows) for kind, rows in self.kinds.items()}
        return AnswerTypeCounts(kinds, (), self.never_perturbed.pooled)

    @property
    def untouched(self) -> np.ndarray:
        """The counts of all queries on untouched images, n and n_correct: int64 [2, bins]."""
        return np.add(next(iter(self.kinds.values()))[0][1:], self.never_perturbed[1:])


def _count(kind: str, row: Sequence[Any], n_bins: int, least: int = 1) -> LevelCount:
    n, n_correct = map(np.atleast_1d, row[1:])
    if not n.shape == n_correct.shape == (n_bins,):
        raise ValueError(f"every count must have {n_bins} bins, one more than there are likelihood edges")
    whole = (n % 1 == 0) & (n_correct % 1 == 0)
    if not (whole & (least <= n) & (n_correct <= n) & (n_correct >= 0)).all():
        raise ValueError(f"impossible count of {kind!r}: {n_correct.tolist()} correct of {n.tolist()}")
    return LevelCount(float(row[0]), tuple(map(int, n)), tuple(map(int, n_correct)))


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
            if counts.strengths != self.strengths:
                types = f"answer types {first!r} and {other!r}"
                raise ValueError(f"{types} were measured with different kinds or strengths of perturbation")

    @cached_property
    def strengths(self) -> dict[str, list[float]]:
        """Kind of perturbation -> the measured strengths."""
        return next(iter(self.counts.values())).strengths

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.strengths)

    @property
    def ranked(self) -> bool:
        """Whether the counts of open answers rank given answers, and grade no generated ones."""
        return "ranking" in self.provenance.get("grading", {}).values()

    def check_usable(self) -> None:
        """Raise a ValueError for counts from which no useful confidence can be learned.

        Every answer type must pass two one-sided tests at the 5% level: a binomial test that the accuracy on untouched images
        exceeds a blind guess (1/2 for yes/no and ranking, 1/20 for other answers, our choice), and for each kind of
        perturbation a Cochran-Armitage test that accuracy falls with the strength, conservative for repeated queries.
        """
        for answer_type, counts in self.counts.items():
            has_two_answers = answer_type == "yes_no" or (self.ranked and answer_type == "open")
            guess = 0.5 if has_two_answers else 0.05
            n, n_correct = map(int, counts.untouched.sum(axis=1))
            for kind, rows in counts.kinds.items():
                if guess**n > SIGNIFICANCE:
                    needed = math.ceil(math.log(SIGNIFICANCE) / math.log(guess))
                    reason = f"{n} clean queries are too few, at least {needed} are needed"
                elif binomtest(n_correct, n, guess, "greater").pvalue > SIGNIFICANCE:
                    correct = f"the base model is correct on {n_correct} of {n} clean images"
                    reason = f"{correct}, not significantly more than the {guess:.0%} of a blind guess"
                elif trend_p_value(rows) > SIGNIFICANCE:
                    reason = f"{kind} does not significantly lower the base model's accuracy: leave it out of data.noise.kinds"
                else:
                    continue
                shown = ", ".join(f"{sum(row.n_correct)}/{sum(row.n)} at {row.strength:g}" for row in rows)
                advice = "measure more or other queries, ask with another prompt (data.prompt)"
                if not has_two_answers:
                    advice += ", or grade by another rule (data.grading: contains or token_f1)"
                    advice += ", or rank open answers with a rejected one (data.grading.rank_levels)"
                reason += f" (correct, by strength of {kind}: {shown})"
                raise ValueError(f"{answer_type} answers teach no confidence: {reason}; {advice}")

    def save(self, path: Path) -> None:
        """Write the table as JSON, atomically."""
        answer_types = {
            answer_type: {
                "likelihood_edges": counts.edges,
                "kinds": {kind: [row._asdict() for row in rows] for kind, rows in counts.kinds.items()},
                "never_perturbed": dict(zip(("n", "n_correct"), counts.never_perturbed[1:], strict=True)),
            }
            for answer_type, counts in self.counts.items()
        }
        content = {"format": FORMAT, "provenance": dict(self.provenance), "answer_types": answer_types}
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def trend_p_value(rows: Sequence[LevelCount]) -> float:
    """One-sided p-value of the Cochran-Armitage test that accuracy falls with the strength (Armitage, 1955)."""
    pooled = [(row.strength, sum(row.n), sum(row.n_correct)) for row in rows]
    strengths, n, correct = np.array(pooled, dtype=np.float64).T
    mean = correct.sum() / n.sum()
    centred = strengths - np.average(strengths, weights=n)
    if (variance := mean * (1 - mean) * (n * centred**2).sum()) <= 0:
        return 1.0
    return float(norm.cdf((centred * (correct - n * mean)).sum() / math.sqrt(variance)))


def read_table(path: Path) -> LevelTable:
    """Read a level table; a ValueError if the file is none, or not a usable one (`LevelTable.check_usable`)."""
    if not path.is_file():
        raise FileNotFoundError(f"no level table at {path}; write one with `vlm-calibration levels fit`")
    try:
        content = parse_json(path.read_bytes())
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        if found != FORMAT:
            expected = f"a JSON object with format {FORMAT!r}"
            raise ValueError(f"expected {expected}, found {found!r}: {MEASURE_AGAIN}")
        counts = {
            answer_type: AnswerTypeCounts(
                {
                    kind: tuple(LevelCount(row["strength"], row["n"], row["n_correct"]) for row in rows)
                    for kind, rows in value["kinds"].items()
                },
                value["likelihood_edges"],
                LevelCount(0.0, value["never_perturbed"]["n"], value["never_perturbed"]["n_correct"]),
            )
            for answer_type, value in content["answer_types"].items()
        }
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
    import pyarrow as pa  # deferred: slow to import
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

    A ValueError if it is none, or was measured with another model or prompt than the level table `table` with this provenance.
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
    if differing := [key for key in COMPARED if measured.get(key) != provenance.get(key)]:
        problem = f"{path} and {table} were measured with another {', '.join(differing)}"
        raise ValueError(f"{problem}: write both with `vlm-calibration levels fit`")
    if len(values) and not (values.min() >= 0 and values.max() <= 1):  # also refuses NaN
        raise ValueError(f"{path}: likelihoods must be in [0, 1], found {values.min()} to {values.max()}")
    return dict(zip(ids, map(Measured, values.tolist(), contents), strict=True))
