"""Which responses stage 2 compares: the model's own answers as candidates, the chosen candidate, and the rejected ones.

With gold answers a model would learn how confident to be of answers that it does not give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vlm_calibration.data.candidates import Candidate, CandidateBatch, Candidates
from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.data.noise import query_rng
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.records import DataError, Query

Target = Literal["level", "expected", "likelihood", "p_true", "self_consistency", "fitted", "correct"]
OF_GOLD_ANSWERS: tuple[Target, ...] = ("level", "expected", "correct")
"""Targets that gold answers have."""


@dataclass(frozen=True)
class PairPolicy:
    """Which of a query's candidates is chosen and which are rejected.

    Args:
        target: the confidence that the chosen response states: the candidate nearest to it. "level": that of the perturbation, as
            in the paper. "expected": the mean of the reference's distribution over the candidates' levels: greedy decoding
            states the mode of that distribution, but its mean is what is calibrated. "likelihood", "p_true" and
            "self_consistency": what the estimator of this name makes of the reference's own answer. "fitted": the accuracy
            that `model.teacher` maps such estimates to. "correct": 1 for a correct answer and 0 for a wrong one, for losses whose
            optimum is then the accuracy. Own answers (`data.candidates.answers: own`) have all of these, gold answers the
            first two and the last.
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
                "model.pairs.n_rejected must be at least 1, and is not allowed with `rejected: all`, "
                f"found {self.n_rejected}"
            )
        if self.seed < 0:
            raise DataError(f"model.pairs.seed must be at least 0, found {self.seed}")


class Comparison(NamedTuple):
    """What a step compares for B queries.

    Attributes:
        candidates: all candidates of each.
        picks: for each the index of the chosen candidate, then those of the rejected ones.
        targets: for each the target confidence in [0, 1]; NaN for an answer that the teacher does not rate.
        is_correct: for each whether the answer is correct.
        reference: the reference's scores of the picked candidates, [B, K, T]; None if nothing needs them.
        of_all: the reference's scores of all candidates; None if the choice does not depend on them.
    """

    candidates: Candidates
    picks: tuple[tuple[int, ...], ...]
    targets: tuple[float, ...]
    is_correct: tuple[bool, ...]
    reference: ResponseScores | None = None
    of_all: ResponseScores | None = None

    @property
    def compared(self) -> Candidates:
        """The picked candidates of each query."""
        rows = zip(self.candidates, self.picks, strict=True)
        return tuple(tuple(candidates[i] for i in picks) for candidates, picks in rows)

    @property
    def correct(self) -> list[list[bool]]:
        """For each query whether the answer of each picked candidate is correct.

        A wrong candidate beside a gold answer is wrong, and one beside a wrong own answer is its opposite.
        """
        rows = zip(self.compared, self.is_correct, strict=True)
        return [[c.wrong != correct for c in candidates] for candidates, correct in rows]

    def rated(self, policy: ResponseScores) -> tuple[Comparison, ResponseScores]:
        """The comparison of the queries that have a target, and the policy's scores of them."""
        rows = [row for row, target in enumerate(self.targets) if not math.isnan(target)]

        def select(values: Any) -> Any:
            if isinstance(values, ResponseScores):
                return ResponseScores(*(scores[rows] for scores in values))
            return None if values is None else tuple(values[row] for row in rows)

        return Comparison(*map(select, self)), select(policy)


def picked(scores: ResponseScores, picks: Sequence[Sequence[int]]) -> ResponseScores:
    """The scores of the picked candidates, [B, K, T] for the largest number K of picks; a row with fewer repeats its first."""
    width = max(map(len, picks))
    index = torch.tensor([[*p, *[p[0]] * (width - len(p))] for p in picks], device=scores.tokens.device)
    rows = torch.arange(len(picks), device=index.device)[:, None]
    return ResponseScores(*(values[rows, index] for values in scores))


def level_log_p(total: Tensor, candidates: Candidates) -> list[tuple[list[float], Tensor]]:
    """For each query the levels that its answer can state, and log p of each, from that of all candidates, float [B, K]."""
    levels = []
    for row, of_query in enumerate(candidates):
        indices = [k for k, c in enumerate(of_query) if not c.wrong]
        levels.append(([of_query[k].confidence for k in indices], total[row, indices]))
    return levels


@torch.no_grad()
def kl_divergence(policy: Tensor, reference: Tensor, candidates: Candidates) -> Tensor:
    """KL divergence of the reference's distribution over levels from the policy's, in nats, averaged over queries."""
    values = []
    rows = zip(level_log_p(policy, candidates), level_log_p(reference, candidates), strict=True)
    for (_, policy_log_p), (_, reference_log_p) in rows:
        log_p, log_q = (torch.log_softmax(x.float(), -1) for x in (policy_log_p, reference_log_p))
        values.append((log_p.exp() * (log_p - log_q)).sum())
    return torch.stack(values).mean()


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
            picks.append((target, *(i for i in range(len(candidates)) if i != target)))
            continue
        chosen = choose(policy, candidates, target, query, batch.epochs[row])
        # A wrong answer is not preferred over its opposite, which is correct.
        picks.append(tuple(i for i in chosen if batch.is_correct[row] or not candidates[i].wrong))
    return tuple(picks)


def nearest(levels: Sequence[float], confidence: float) -> int:
    """Index of the level nearest to a confidence; of two equally near ones, the higher."""
    return min(range(len(levels)), key=lambda i: (round(abs(levels[i] - confidence), 9), -levels[i]))


def choose(
    policy: PairPolicy, candidates: Sequence[Candidate], target: int, query: Query, epoch: int
) -> list[int]:
    """The index of the chosen candidate, which is `target`, then the indices of the rejected ones.

    Which are drawn is a pure function of (seed, epoch, query id).
    """
    rejected = [i for i, c in enumerate(candidates) if not c.wrong and i != target]
    if policy.rejected == "uniform":
        rng = query_rng(policy.seed, epoch, query.id, "rejected")
        rejected = rng.permutation(rejected).tolist()[: policy.n_rejected or 1]
    confidence = candidates[target].confidence
    wrong = [i for i, c in enumerate(candidates) if c.wrong and c.confidence == confidence]
    return [target, *rejected, *wrong]


def own_answers(
    model: Any, batch: PromptBatch, tokenizer: AnswerTokenizer, max_new_tokens: int
) -> AnsweredBatch:
    """The greedy, graded answers of the active adapter to B prompts, with the cache of their prompts.

    An answer that is cut off at `max_new_tokens` is empty: with an end that the model did not give it, it would be another answer.
    Call it in eval mode and under `torch.no_grad`.
    """
    answered = AnsweredBatch.generate(model, batch, tokenizer, max_new_tokens)
    rated = [
        answer if complete else replace(answer, text="", predicted=None, confidence=None, correct=False)
        for answer, complete in zip(answered.predictions, answered.complete, strict=True)
    ]
    return replace(answered, predictions=rated)


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
