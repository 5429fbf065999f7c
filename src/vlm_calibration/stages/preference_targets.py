"""Which response stage 2 prefers: the target confidence of each answer, and the candidates to compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlm_calibration.data.candidates import Candidate, CandidateBatch, Candidates
from vlm_calibration.data.noise import query_rng
from vlm_calibration.estimators.base import AnsweredBatch, Estimator
from vlm_calibration.estimators.consistency import SelfConsistency
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.p_true import PTrue
from vlm_calibration.estimators.teacher import FittedTeacher, TaughtAnswer, TeacherSettings
from vlm_calibration.estimators.verbal import ExpectedConfidence, expected_confidence
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.records import DataError, Query
from vlm_calibration.stages.training import gather

Target = Literal["level", "expected", "likelihood", "p_true", "self_consistency", "fitted", "correct"]
OF_GOLD_ANSWERS: tuple[Target, ...] = ("level", "expected", "correct")
"""Targets that gold answers have."""
RATING: tuple[type[Estimator], ...] = (ExpectedConfidence, AnswerLikelihood, PTrue, SelfConsistency)
ESTIMATORS = {estimator.name: estimator for estimator in RATING}


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
                "`target: fitted`: the reference gives no answer to a query of data.teacher, or data.validation, that "
                f"{' and '.join(self.settings.features)} rate, so there is nothing to fit: use `target: expected`, train stage 1 "
                "longer, or raise model.max_new_tokens if it cuts answers off"
            )
        self.fitted = FittedTeacher.fit(self.settings, rows)


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
