"""Which response stage 2 prefers: the target confidence of each answer, the teacher that rates answers, and the candidates to compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from torch import Tensor

from vlm_calibration.data.candidates import Candidate, CandidateBatch, Candidates
from vlm_calibration.data.noise import query_rng
from vlm_calibration.estimators.base import AnsweredBatch, Estimator
from vlm_calibration.estimators.consistency import SelfConsistency
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.p_true import PTrue
from vlm_calibration.estimators.recalibration import SMALLEST
from vlm_calibration.estimators.verbal import ExpectedConfidence, expected_confidence
from vlm_calibration.metrics.functional import auroc, brier_score, expected_calibration_error
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.records import DataError, Query

Target = Literal["level", "expected", "likelihood", "p_true", "self_consistency", "fitted", "correct"]
OF_GOLD_ANSWERS: tuple[Target, ...] = ("level", "expected", "correct")
"""Targets that gold answers have."""
Feature = Literal["expected", "likelihood", "p_true", "self_consistency"]
RATING: tuple[type[Estimator], ...] = (ExpectedConfidence, AnswerLikelihood, PTrue, SelfConsistency)
ESTIMATORS = {estimator.name: estimator for estimator in RATING}
Map = tuple[Any, Any]
"""Logistic: the weights of the features' log-odds, and the intercept. Isotonic: rising confidences, and the accuracy at each."""


@dataclass(frozen=True)
class PairPolicy:
    """Which of a query's candidates is chosen and which are rejected.

    Args:
        target: the confidence that the chosen response states: the candidate nearest to it. "level": that of the perturbation, as
            in the paper. "expected": the mean of the reference's distribution over the candidates' levels, which is calibrated, unlike
            its mode, which greedy decoding states. "likelihood", "p_true", "self_consistency": this estimate of the reference's own
            answer. "fitted": the accuracy that `model.teacher` maps such estimates to. "correct": 1 for a correct answer, else 0, for
            losses whose optimum is then the accuracy. Gold answers have "level", "expected" and "correct"; own answers have all.
        rejected: which other levels are rejected: "all" of them, or `n_rejected` drawn at random ("uniform").
        n_rejected: how many levels are rejected, 1 by default; not allowed with "all".
        seed: seed of the random draws.
    """

    target: Target = "expected"
    rejected: Literal["all", "uniform"] = "all"
    n_rejected: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_rejected is not None and (self.rejected == "all" or self.n_rejected < 1):
            raise DataError(
                f"model.pairs.n_rejected must be at least 1, and is not allowed with `rejected: all`, found {self.n_rejected}"
            )
        if self.seed < 0:
            raise DataError(f"model.pairs.seed must be at least 0, found {self.seed}")


@dataclass(frozen=True)
class TeacherSettings:
    """The teacher that `pairs.target: fitted` fits on the reference's answers to the validation queries.

    Args:
        features: estimates of the reference's confidence that the map combines, as in an evaluation's `model.estimators`.
        map: "logistic": logistic regression of correctness on the log-odds of the features. "isotonic": isotonic regression
            on a single feature.
    """

    features: tuple[Feature, ...] = ("likelihood", "expected")
    map: Literal["logistic", "isotonic"] = "logistic"

    def __post_init__(self) -> None:
        if not self.features or len(set(self.features)) < len(self.features):
            raise DataError(f"model.teacher.features: at least one, each once, found {list(self.features)}")
        if self.map == "isotonic" and len(self.features) > 1:
            raise DataError(
                f"model.teacher: `map: isotonic` takes one feature, found {list(self.features)}: use one, or `map: logistic`"
            )


class TaughtAnswer(NamedTuple):
    """One answer that a teacher is fitted on, with its confidences in [0, 1] in the order of the settings."""

    features: tuple[float, ...]
    correct: bool
    answer_type: str
    image: str


@dataclass(frozen=True, repr=False)
class FittedTeacher:
    """Maps from estimates of confidence to accuracy, one for each answer type.

    The `scores` of the answers, each by maps that were fitted on other images, are `n`, `accuracy`, `brier`, `ece` and `auroc`, without
    those that are undefined, such as `auroc` if all answers are correct.
    """

    settings: TeacherSettings
    maps: Mapping[str, Map]
    scores: Mapping[str, float]

    def __call__(self, features: Sequence[float], answer_type: str) -> float:
        """The accuracy in [0, 1] of answers with such features; raises a DataError if no answer of this type was fitted."""
        if answer_type not in self.maps:
            raise DataError(
                f"`target: fitted`: no {answer_type} answer to data.validation, only {', '.join(sorted(self.maps))}: add such queries"
            )
        first, second = self.maps[answer_type]
        if self.settings.map == "isotonic":
            return float(np.interp(features[0], first, second))
        z = float(np.dot(first, _log_odds(np.array(features))) + second)
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))

    @staticmethod
    def fit(settings: TeacherSettings, answers: Sequence[TaughtAnswer]) -> FittedTeacher:
        """Fit the maps on at least one answer. The order of the answers does not matter."""
        rows = sorted(answers)
        return FittedTeacher(settings, _fit_maps(settings, rows), _cross_validated(settings, rows))

    @staticmethod
    def from_state(settings: TeacherSettings, state: Mapping[str, Any]) -> FittedTeacher:
        """The teacher of a checkpoint; raises a DataError if it was fitted with other settings."""
        if state["settings"] != asdict(settings):
            raise DataError(
                f"--ckpt_path: its teacher was fitted with {state['settings']}, but model.teacher is {asdict(settings)}: use the former"
            )
        return FittedTeacher(settings, state["maps"], state["scores"])

    def __repr__(self) -> str:
        scores = ", ".join(f"{k} {v:g}" if k == "n" else f"{k} {v:.3f}" for k, v in self.scores.items())
        return f"{self.settings.map} map of {' and '.join(self.settings.features)}, cross-validated: {scores}"


class TargetChooser:
    """Chooses the confidence that each answer should state: a target of `PairPolicy`; "fitted" fits a teacher of these settings."""

    def __init__(self, target: Target, settings: TeacherSettings) -> None:
        self.target = target
        self.settings = settings
        features = settings.features if target == "fitted" else (target,)
        self.estimators = [] if target in OF_GOLD_ANSWERS else [ESTIMATORS[name]() for name in features]
        self.fitted: FittedTeacher | None = None

    @property
    def is_ready(self) -> bool:
        """False for a teacher that is still to be fitted."""
        return self.target != "fitted" or self.fitted is not None

    def __call__(
        self, batch: CandidateBatch, reference: ResponseScores | None, answered: AnsweredBatch | None
    ) -> tuple[float, ...]:
        """For each query the target in [0, 1]; NaN for an own answer that is none, or that an estimator does not rate.

        "expected" needs the reference's scores of all candidates, estimators its own answers, which the candidates give.
        """
        targets: Sequence[float]
        if self.target == "level":
            targets = batch.levels
        elif self.target == "correct":
            targets = [float(correct) for correct in batch.is_correct]
        elif self.target == "expected":
            assert reference is not None
            levels = level_log_p(reference.total, batch.candidates)
            targets = [expected_confidence(confidences, log_p.cpu()) for confidences, log_p in levels]
        else:
            assert answered is not None
            assert self.is_ready
            rate: Any = self.fitted if self.target == "fitted" else lambda features, _: features[0]
            rows = zip(self.features(answered), batch.queries, strict=True)
            targets = [math.nan if f is None else rate(f, query.answer_type) for f, query in rows]
        if answered is None:
            return tuple(targets)
        answers = zip(targets, answered.answers, strict=True)
        return tuple(math.nan if answer is None else target for target, answer in answers)

    def features(self, answered: AnsweredBatch) -> list[tuple[float, ...] | None]:
        """For each query the estimates of the confidence in its answer; None for an answer that one of them does not rate."""
        columns = [estimator.estimate(answered).confidence for estimator in self.estimators]
        rows = zip(*columns, strict=True)
        return [None if None in row else tuple(c for c in row if c is not None) for row in rows]

    def taught(self, answered: AnsweredBatch) -> list[TaughtAnswer]:
        """The rated answers of a batch, to fit on."""
        rows = zip(self.features(answered), answered.predictions, strict=True)
        return [TaughtAnswer(f, p.correct, p.answer_type, p.image or "") for f, p in rows if f is not None]

    def fit(self, rows: list[TaughtAnswer]) -> None:
        """Fit the teacher on the answers of all processes, each of which gives its own; raises a DataError if there are none."""
        rows = gather(rows)  # before any error is raised, so that no process waits for another
        if not rows:
            raise DataError(
                "`target: fitted`: the reference gives no answer to a validation query that "
                f"{' and '.join(self.settings.features)} rate, so there is nothing to fit: use `target: expected`, train stage 1 "
                "longer, or raise model.max_new_tokens if it cuts answers off"
            )
        self.fitted = FittedTeacher.fit(self.settings, rows)


def gather(rows: list[Any]) -> list[Any]:
    """The rows of all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]


def _fit_maps(settings: TeacherSettings, rows: Sequence[TaughtAnswer]) -> dict[str, Map]:
    maps: dict[str, Map] = {}
    for kind in sorted({row.answer_type for row in rows}):
        of_kind = [row for row in rows if row.answer_type == kind]
        features = np.array([row.features for row in of_kind])  # float64 [N, F]
        correct = np.array([row.correct for row in of_kind])
        n, n_correct = len(correct), int(correct.sum())
        if settings.map == "isotonic":
            isotonic = IsotonicRegression(y_min=0.0, y_max=1.0).fit(features[:, 0], correct.astype(float))
            maps[kind] = tuple(isotonic.X_thresholds_.tolist()), tuple(isotonic.y_thresholds_.tolist())
        elif n_correct in (0, n):
            # One outcome has no finite fit: the rule of succession, whatever the features are.
            maps[kind] = (0.0,) * features.shape[1], math.log((n_correct + 1) / (n - n_correct + 1))
        else:
            logistic = LogisticRegression(max_iter=1000).fit(_log_odds(features), correct)
            maps[kind] = tuple(logistic.coef_[0].tolist()), float(logistic.intercept_[0])
    return maps


def _log_odds(confidence: np.ndarray) -> np.ndarray:
    clipped = np.clip(confidence, SMALLEST, 1 - SMALLEST)
    return np.log(clipped) - np.log1p(-clipped)


def _cross_validated(settings: TeacherSettings, rows: Sequence[TaughtAnswer]) -> dict[str, float]:
    """Scores of teachers on answers about images that they were not fitted on, in at most five folds."""
    images = [row.image for row in rows]
    folds = min(5, len(set(images)))
    correct = torch.tensor([row.correct for row in rows])
    scores = {"n": float(len(rows)), "accuracy": float(correct.double().mean())}
    if folds < 2:
        return scores
    confidence = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    for fitted_on, held_out in GroupKFold(folds).split(images, groups=images):
        teacher = FittedTeacher(settings, _fit_maps(settings, [rows[i] for i in fitted_on]), {})
        for i in held_out:
            if rows[i].answer_type in teacher.maps:
                confidence[i] = teacher(rows[i].features, rows[i].answer_type)
    rated = ~confidence.isnan()  # all but those of an answer type of a single fold
    confidence, correct = confidence[rated], correct[rated]
    if len(correct):
        scores["brier"] = float(brier_score(confidence, correct))
        scores["ece"] = float(expected_calibration_error(confidence, correct))
    if len(correct.unique()) == 2:
        scores["auroc"] = float(auroc(confidence, correct))
    return scores


def level_log_p(total: Tensor, candidates: Candidates) -> list[tuple[list[float], Tensor]]:
    """For each query the levels that its answer can state, and log p of each, from that of all candidates, float [B, K]."""
    levels = []
    for row, of_query in enumerate(candidates):
        indices = [k for k, c in enumerate(of_query) if not c.wrong]
        levels.append(([of_query[k].confidence for k in indices], total[row, indices]))
    return levels


def choose_candidates(
    policy: PairPolicy, batch: CandidateBatch, targets: Sequence[float], *, everything: bool = False
) -> tuple[tuple[int, ...], ...]:
    """For each query the index of its chosen candidate, then those of its rejected ones.

    Args:
        targets: for each query the target confidence in [0, 1]; for NaN any candidate is chosen.
        everything: all other candidates instead of the rejected ones, for losses of the distribution over them.
    """
    picks: list[tuple[int, ...]] = []
    for row, (query, candidates) in enumerate(zip(batch.queries, batch.candidates, strict=True)):
        target = nearest([c.confidence for c in candidates if not c.wrong], targets[row])
        if everything:
            chosen = [target, *(i for i in range(len(candidates)) if i != target)]
        else:
            # A wrong answer is not preferred over its opposite, which is correct.
            chosen = choose(policy, candidates, target, query, batch.epochs[row])
            chosen = [i for i in chosen if batch.is_correct[row] or not candidates[i].wrong]
        picks.append(tuple(chosen))
    return tuple(picks)


def nearest(levels: Sequence[float], confidence: float) -> int:
    """Index of the level nearest to a confidence; of two equally near ones, the higher."""
    return min(range(len(levels)), key=lambda i: (round(abs(levels[i] - confidence), 9), -levels[i]))


def choose(
    policy: PairPolicy, candidates: Sequence[Candidate], target: int, query: Query, epoch: int
) -> list[int]:
    """The index of the chosen candidate, `target`, then those of the rejected ones, drawn by (seed, epoch, query id)."""
    rejected = [i for i, c in enumerate(candidates) if not c.wrong and i != target]
    if policy.rejected == "uniform":
        rng = query_rng(policy.seed, epoch, query.id, "rejected")
        rejected = rng.permutation(rejected).tolist()[: policy.n_rejected or 1]
    confidence = candidates[target].confidence
    wrong = [i for i, c in enumerate(candidates) if c.wrong and c.confidence == confidence]
    return [target, *rejected, *wrong]


def own_candidates(answered: AnsweredBatch) -> CandidateBatch:
    """The candidates that give the answers of a batch; those of a query without an answer give its gold answer."""
    batch, answers = answered.batch, answered.scored_answers.answers
    cut = torch.tensor([a.cut - a.offset for a in answers], device=answered.prompts.lengths.device)
    return CandidateBatch(
        inputs=dict(answered.prompts.inputs),
        lengths=answered.prompts.lengths - cut,
        candidates=tuple(a.candidates for a in answers),
        levels=batch.levels,
        is_correct=tuple(p.correct for p in answered.predictions),
        epochs=batch.epochs,
        queries=batch.queries,
        skipped=batch.skipped,
        n_cut_off=answered.complete.count(False),
    )
