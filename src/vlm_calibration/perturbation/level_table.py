"""Level tables: how often the base model was right at each noise step, where that comes from, and whether it is of use."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import binomtest, norm

FORMAT = "vlm_calibration.levels/1"

SIGNIFICANCE = 0.05
FREE_GUESS = 0.05
GRADE_OTHERWISE = ", or grade by another rule (data.grading: contains or token_f1; ranking for open answers with a rejected one)"


class StepCount(NamedTuple):
    """How often the base model was right at one noise step: `n_correct` of `n` held-out queries."""

    step: int
    n: int
    n_correct: int


@dataclass(frozen=True)
class LevelTable:
    """What was measured, and how.

    Args:
        counts: answer type -> counts, one per noise step; every answer type has the same steps, 0 among them.
        provenance: model, schedule, seed, number of queries, ...: whatever says where the counts come from.

    Raises:
        ValueError: if it is empty, counts are impossible, steps repeat or differ between answer types, or 0 is missing.
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
        """Refuse counts that would teach a model to state nothing but "wrong", or one number for any noise.

        For every answer type two one-sided tests at a level of 5% must be met: a binomial test that the base model is right
        on clean images more often than a blind guess (half the time for yes/no and for ranking, one time in twenty, our
        choice, for what is said freely), and a Cochran-Armitage test that it is right less often the more noise there is.
        That the same queries are asked at every step makes the second one cautious.

        Raises:
            ValueError: they are not; the message names the answer type and its counts, and what to do.
        """
        for kind, rows in self.counts.items():
            by_ranking = self.provenance.get("grading", {}).get(kind) == "ranking"
            guess = 0.5 if kind == "yes_no" or by_ranking else FREE_GUESS
            reason = _doubt(rows, guess)
            if reason is None:
                continue
            counts = ", ".join(f"{row.n_correct}/{row.n} at {row.step}" for row in rows)
            rule = "" if kind == "yes_no" or by_ranking else GRADE_OTHERWISE
            raise ValueError(
                f"{kind} answers teach no confidence: {reason} (right, by noise step: {counts}); measure more or other "
                f"queries, ask by another prompt (data.prompt){rule}"
            )


def _doubt(rows: Sequence[StepCount], guess: float) -> str | None:
    """Why these counts are of no use, or None."""
    clean = rows[0]
    if guess**clean.n > SIGNIFICANCE:
        least = math.ceil(math.log(SIGNIFICANCE) / math.log(guess))
        return f"{clean.n} clean queries are not enough answers to tell, which takes {least} at the least"
    if binomtest(clean.n_correct, clean.n, guess, "greater").pvalue > SIGNIFICANCE:
        return (
            f"the base model is right on {clean.n_correct} of {clean.n} clean images, not significantly more than the "
            f"{guess:.0%} of a blind guess"
        )
    if trend_p_value(rows) > SIGNIFICANCE:
        return "noise does not significantly lower how often the base model is right"
    return None


def trend_p_value(rows: Sequence[StepCount]) -> float:
    """One-sided p-value in [0, 1] of the Cochran-Armitage test that accuracy falls with the noise step (Armitage, 1955)."""
    steps, n, right = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    mean = right.sum() / n.sum()
    away = steps - np.average(steps, weights=n)
    variance = mean * (1 - mean) * (n * away**2).sum()
    return float(norm.cdf((away * (right - n * mean)).sum() / math.sqrt(variance))) if variance > 0 else 1.0


def isotonic_accuracy(rows: Sequence[StepCount]) -> np.ndarray:
    """Weighted least-squares fit of the accuracies that never rises with the step; shape `(len(rows),)`."""
    accuracy = np.array([row.n_correct / row.n for row in rows])
    weights = np.array([row.n for row in rows], dtype=np.float64)
    fit = isotonic_regression(accuracy, weights=weights, increasing=False).x
    return np.clip(fit, 0.0, 1.0)  # block means may leave [0, 1] by one rounding error


def read_table(path: Path) -> LevelTable:
    """The table of a file that `AnchoredLevels.save` wrote.

    Raises:
        FileNotFoundError: there is none. ValueError: it is not a level table, or not a usable one (`check_usable`).
    """
    if not path.is_file():
        raise FileNotFoundError(f"no level table at {path}; write one with `vlm-calibration levels fit`")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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
