"""Which response stage 2 prefers: the target confidence, the chosen candidate and the rejected ones.

The target is the level of the noise, or it follows from the reference model's distribution over the levels for this very image.
Given that distribution, the choice is a pure function of (seed, epoch, query id).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import isotonic_regression
from torch import Tensor

from vlm_calibration.data.candidates import Candidate, CandidateBatch, Candidates, ResponseTokenizer
from vlm_calibration.data.noise import query_rng
from vlm_calibration.models.vision import shared_vision
from vlm_calibration.records import DataError, Prediction, Query
from vlm_calibration.stages.answering import answer_batch, tokenizer_of
from vlm_calibration.text.confidence import strip_confidence


@dataclass(frozen=True)
class PairPolicy:
    """Which of a query's candidates is chosen and which are rejected.

    Args:
        target: the confidence that the chosen response states. "level": the level of the noise, as in the paper.
            "expected": the candidate nearest to the mean of the reference's distribution over the candidates' levels.
            "recalibrated": the same after an isotonic map that is fitted on the validation queries before training.
            Greedy decoding states the mode of the distribution, but its mean is what is calibrated: "level" sharpens the
            mode, "expected" moves it to the mean.
        rejected: which other levels are rejected: "all" of them, or `n_rejected` drawn at random ("uniform"), those
            furthest from the target ("far") or those nearest to it ("adjacent").
        n_rejected: how many levels are rejected, 1 by default; not allowed with "all".
        on_policy: if the reference would state another level than the target, reject that level first; no effect with "all".
        seed: seed of the random draws.
    """

    target: Literal["expected", "recalibrated", "level"] = "expected"
    rejected: Literal["all", "uniform", "far", "adjacent"] = "all"
    n_rejected: int | None = None
    on_policy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_rejected is not None and (self.rejected == "all" or self.n_rejected < 1):
            raise DataError(
                "model.pairs.n_rejected must be at least 1, and is not allowed with `rejected: all`, "
                f"found {self.n_rejected}"
            )
        if self.seed < 0:
            raise DataError(f"model.pairs.seed must be at least 0, found {self.seed}")

    @property
    def needs_reference(self) -> bool:
        """Whether the choice depends on the reference's distribution over the levels."""
        return self.target != "level" or self.on_policy


class LevelDistribution(NamedTuple):
    """A model's distribution over the levels that its answer to a query can state.

    Attributes:
        total: float [B, K], log p of each candidate.
        candidates: for each query K candidates at most, every level once per answer. Wrong answers do not count.
    """

    total: Tensor
    candidates: Candidates

    def log_p(self, row: int) -> Tensor:
        """Log-probabilities of one query's levels, normalised over them: float32 [levels]."""
        return torch.log_softmax(self.total[row, self._indices(row)].float(), -1)

    def expected(self, row: int) -> float:
        """The mean confidence of one query over its levels, in [0, 1]."""
        log_p = self.log_p(row)
        levels = log_p.new_tensor([self.candidates[row][k].confidence for k in self._indices(row)])
        return float((log_p.exp() * levels).sum())

    def mode(self, row: int) -> int:
        """Index of the most likely candidate of one query, the one that greedy decoding states."""
        return self._indices(row)[int(self.log_p(row).argmax())]

    def _indices(self, row: int) -> list[int]:
        return [k for k, c in enumerate(self.candidates[row]) if not c.wrong]


@torch.no_grad()
def kl_divergence(policy: LevelDistribution, reference: LevelDistribution) -> Tensor:
    """KL divergence of the policy's distribution over the levels from the reference's, in nats, averaged over queries."""
    values = []
    for row in range(len(policy.candidates)):
        log_p = policy.log_p(row)
        values.append((log_p.exp() * (log_p - reference.log_p(row))).sum())
    return torch.stack(values).mean()


def choose_candidates(
    policy: PairPolicy,
    batch: CandidateBatch,
    reference: LevelDistribution | None = None,
    recalibration: IsotonicMap | None = None,
) -> list[list[int]]:
    """For each query the index of its chosen candidate, then those of its rejected ones.

    Args:
        reference: the reference's distribution over all candidates; required if `policy.needs_reference`.
        recalibration: map of the expected confidence; required by the target "recalibrated".
    """
    picks = []
    for row, (query, candidates) in enumerate(zip(batch.queries, batch.candidates, strict=True)):
        confidence, mode = batch.levels[row], None
        if policy.needs_reference:
            assert reference is not None
            mode = reference.mode(row)
            if policy.target != "level":
                confidence = reference.expected(row)
        if policy.target == "recalibrated":
            assert recalibration is not None
            confidence = recalibration(confidence, query.answer_type)
        target = nearest([c.confidence for c in candidates if not c.wrong], confidence)
        picks.append(choose(policy, candidates, target, query, batch.epochs[row], mode))
    return picks


def nearest(levels: Sequence[float], confidence: float) -> int:
    """Index of the level nearest to a confidence; of two equally near ones, the higher."""
    return min(range(len(levels)), key=lambda i: (round(abs(levels[i] - confidence), 9), -levels[i]))


def choose(
    policy: PairPolicy,
    candidates: Sequence[Candidate],
    target: int,
    query: Query,
    epoch: int,
    mode: int | None = None,
) -> list[int]:
    """The target's index, then the indices of the rejected candidates.

    Args:
        target: index of the chosen candidate.
        mode: index of the candidate that the reference would state; required if `policy.on_policy`.
    """
    rejected = [i for i, c in enumerate(candidates) if not c.wrong and i != target]
    confidence = candidates[target].confidence
    if policy.rejected != "all":
        rng = query_rng(policy.seed, epoch, query.id, "rejected")
        rejected = rng.permutation(rejected).tolist()
        sign = {"uniform": 0, "far": -1, "adjacent": 1}[policy.rejected]
        # The sort is stable, so the permutation breaks ties at random.
        rejected.sort(key=lambda i: sign * round(abs(candidates[i].confidence - confidence), 9))
        if policy.on_policy and mode is not None and mode != target:
            rejected.sort(key=lambda i: i != mode)
        rejected = rejected[: policy.n_rejected or 1]
    wrong = [i for i, c in enumerate(candidates) if c.wrong and c.confidence == confidence]
    return [target, *rejected, *wrong]


class IsotonicMap(NamedTuple):
    """A monotone, piecewise linear map from confidence to accuracy for each answer type.

    Attributes:
        knots: answer type -> (confidences in rising order, accuracies), both in [0, 1].
    """

    knots: Mapping[str, tuple[Sequence[float], Sequence[float]]]

    def __call__(self, confidence: float, answer_type: str) -> float:
        """The accuracy at a confidence; the confidence itself for an answer type without knots.

        Raises:
            ValueError: the confidence is NaN.
        """
        if math.isnan(confidence):
            raise ValueError("confidence is not a number")
        if answer_type not in self.knots:
            return confidence
        return float(np.interp(confidence, *self.knots[answer_type]))


def fit_isotonic_map(
    confidence: Sequence[float], correct: Sequence[bool], answer_type: Sequence[str]
) -> IsotonicMap:
    """Isotonic regression of correctness on confidence for each answer type (Zadrozny and Elkan, 2002)."""
    knots = {}
    for kind in sorted(set(answer_type)):
        rows = sorted(
            (c, float(r)) for c, r, t in zip(confidence, correct, answer_type, strict=True) if t == kind
        )
        x = np.array([c for c, _ in rows])
        unique, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        means = np.bincount(inverse, weights=[r for _, r in rows]) / counts
        fit = isotonic_regression(means, weights=counts.astype(np.float64)).x
        knots[kind] = (unique.tolist(), np.clip(fit, 0.0, 1.0).tolist())
    return IsotonicMap(knots)


@torch.no_grad()
def fit_recalibration(module: Any) -> IsotonicMap:
    """Fit the map of `target: recalibrated`: the reference's expected confidence in its own answers to their accuracy.

    The reference answers the validation queries. Every process answers its share, and all fit the same map.

    Args:
        module: a `DPOModule` in training.

    Raises:
        DataError: there are no validation queries, or none of the answers can be parsed.
    """
    data = module.trainer.datamodule
    if data.validation is None:
        raise DataError("data.validation is not set: `target: recalibrated` fits its map on those queries")
    rows: list[tuple[float, bool, str]] = []
    training = module.model.training
    module.model.eval()  # in train mode, gradient checkpointing disables the cache of generation
    for batch in data.val_dataloader():
        prompts, candidates = batch.prompts.to(module.device), batch.candidates.to(module.device)
        if not candidates.inputs:
            continue
        with shared_vision(module.model):
            with module.as_reference():
                answers = answer_batch(module.model, prompts, tokenizer_of(module), module.max_new_tokens)
            answers = [a for a in answers if a.id not in candidates.skipped]
            rows += _score_answers(module, candidates, answers, data.candidate_collator.responses)
    module.model.train(training)
    rows = _all_gather(rows)  # before any error is raised, so that no process waits for another
    if not rows:
        raise DataError(
            "`target: recalibrated`: no answer of the reference to a validation query can be parsed, so there is nothing to "
            "fit its map on: use `target: expected`, or train stage 1 longer"
        )
    return fit_isotonic_map(*zip(*rows, strict=True))


def _score_answers(
    module: Any, batch: CandidateBatch, answers: Sequence[Prediction], responses: ResponseTokenizer
) -> list[tuple[float, bool, str]]:
    """(expected confidence, is correct, answer type) of each answer that is parsed."""
    cuts, candidates = zip(
        *(
            responses.tokenize(query, [strip_confidence(answer.text) or query.answer])
            for query, answer in zip(batch.queries, answers, strict=True)
        ),
        strict=True,
    )
    # How many tokens a response replaces at the end of the prompt depends on the answer.
    lengths = batch.inputs["attention_mask"].sum(dim=1) - torch.tensor(cuts, device=batch.lengths.device)
    total = module.score_reference(batch._replace(lengths=lengths), candidates).total
    distribution = LevelDistribution(total, candidates)
    return [
        (distribution.expected(row), answer.correct, answer.answer_type)
        for row, answer in enumerate(answers)
        if answer.predicted
    ]


def _all_gather(rows: list[Any]) -> list[Any]:
    """The rows of all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]
