"""Level tables: the measured accuracy of the base model at each noise step, its provenance, and whether it is usable."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import binomtest, norm

from vlm_calibration.files import parse_json

FORMAT = "vlm_calibration.levels/1"

SIGNIFICANCE = 0.05
FREE_GUESS = 0.05
"""Assumed accuracy of a blind guess for answers other than yes/no; our choice."""
GRADING_ADVICE = ", or grade by another rule (data.grading: contains or token_f1; ranking for open answers with a rejected one)"


class StepCount(NamedTuple):
    """Accuracy of the base model at one noise step.

    Attributes:
        step: diffusion step of the noise.
        n: number of held-out queries.
        n_correct: number of correct answers.
    """

    step: int
    n: int
    n_correct: int


@dataclass(frozen=True)
class LevelTable:
    """Measured counts and their provenance.

    Args:
        counts: answer type -> counts, one per noise step; all answer types have the same steps, 0 included.
        provenance: origin of the counts: model, schedule, seed, number of queries, ...

    Raises:
        ValueError: no counts, impossible counts, repeated steps, steps that differ between answer types, or no step 0.
    """

    counts: Mapping[str, tuple[StepCount, ...]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ordered = {
            kind: tuple(sorted(StepCount(*map(int, row)) for row in rows))
            for kind, rows in self.counts.items()
        }
        object.__setattr__(self, "counts", ordered)
        if not ordered:
            raise ValueError("a level table needs counts for at least one answer type")
        first = next(iter(ordered))
        expected = [row.step for row in ordered[first]]
        for kind, rows in ordered.items():
            steps = [row.step for row in rows]
            if not steps or steps[0] != 0:
                raise ValueError(
                    f"counts of answer type {kind!r} must begin at step 0, the clean image; got {steps}"
                )
            if len(set(steps)) != len(steps):
                raise ValueError(f"counts of answer type {kind!r} repeat a step: {steps}")
            if steps != expected:
                raise ValueError(f"answer types {first!r} and {kind!r} were measured at different steps")
            for row in rows:
                if row.n < 1 or not 0 <= row.n_correct <= row.n:
                    raise ValueError(f"impossible count for answer type {kind!r}: {row}")

    def check_usable(self) -> None:
        """Refuse counts from which no useful confidence can be learned.

        Every answer type must pass two one-sided tests at the 5% level: a binomial test that the accuracy on clean images
        exceeds a blind guess (1/2 for yes/no and ranking, 1/20 for other answers, our choice), and a Cochran-Armitage test
        that accuracy falls with the noise. The second test is conservative, since the same queries are asked at every step.

        Raises:
            ValueError: a test fails; names the answer type, its counts and what to do.
        """
        for kind, rows in self.counts.items():
            by_ranking = self.provenance.get("grading", {}).get(kind) == "ranking"
            guess = 0.5 if kind == "yes_no" or by_ranking else FREE_GUESS
            reason = _why_unusable(rows, guess)
            if reason is None:
                continue
            counts = ", ".join(f"{row.n_correct}/{row.n} at {row.step}" for row in rows)
            advice = "" if kind == "yes_no" or by_ranking else GRADING_ADVICE
            raise ValueError(
                f"{kind} answers teach no confidence: {reason} (correct, by noise step: {counts}); measure more or other "
                f"queries, ask with another prompt (data.prompt){advice}"
            )


def _why_unusable(rows: Sequence[StepCount], guess: float) -> str | None:
    """Which test the counts fail; None if they pass."""
    clean = rows[0]
    if guess**clean.n > SIGNIFICANCE:
        needed = math.ceil(math.log(SIGNIFICANCE) / math.log(guess))
        return f"{clean.n} clean queries are too few, at least {needed} are needed"
    if binomtest(clean.n_correct, clean.n, guess, "greater").pvalue > SIGNIFICANCE:
        return (
            f"the base model is correct on {clean.n_correct} of {clean.n} clean images, not significantly more than the "
            f"{guess:.0%} of a blind guess"
        )
    if trend_p_value(rows) > SIGNIFICANCE:
        return "noise does not significantly lower the base model's accuracy"
    return None


def trend_p_value(rows: Sequence[StepCount]) -> float:
    """One-sided p-value of the Cochran-Armitage test that accuracy falls with the noise step (Armitage, 1955)."""
    steps, n, correct = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    mean = correct.sum() / n.sum()
    centred = steps - np.average(steps, weights=n)
    variance = mean * (1 - mean) * (n * centred**2).sum()
    return (
        float(norm.cdf((centred * (correct - n * mean)).sum() / math.sqrt(variance))) if variance > 0 else 1.0
    )


def isotonic_accuracy(rows: Sequence[StepCount]) -> np.ndarray:
    """Isotonic fit of the accuracies, weighted by `n`, not increasing with the step; float64 [len(rows)]."""
    accuracy = np.array([row.n_correct / row.n for row in rows])
    weights = np.array([row.n for row in rows], dtype=np.float64)
    fit = isotonic_regression(accuracy, weights=weights, increasing=False).x
    return np.clip(fit, 0.0, 1.0)  # block means may leave [0, 1] by one rounding error


def read_table(path: Path) -> LevelTable:
    """Read a level table that `AnchoredLevels.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a level table, or not a usable one (`LevelTable.check_usable`).
    """
    if not path.is_file():
        raise FileNotFoundError(f"no level table at {path}; write one with `vlm-calibration levels fit`")
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"expected a JSON object with format {FORMAT!r}")
        counts = {
            kind: tuple(StepCount(row["step"], row["n"], row["n_correct"]) for row in rows)
            for kind, rows in content["answer_types"].items()
        }
        table = LevelTable(counts, content["provenance"])
        if not isinstance(table.provenance.get("grading", {}), dict):
            raise ValueError("'grading' must be an object of rules by answer type")
        for kind, rows in table.counts.items():
            stored = [
                row["accuracy"] for row in sorted(content["answer_types"][kind], key=lambda row: row["step"])
            ]
            if not np.allclose(stored, isotonic_accuracy(rows), rtol=0, atol=1e-9):
                raise ValueError(
                    f"the accuracies of {kind!r} are not the fit of its counts; was the file edited?"
                )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"missing key {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a level table: {reason}") from error
    try:
        table.check_usable()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return table
