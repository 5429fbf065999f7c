"""What a step of stage 2 compares, and the terms of its loss; the first of the compared candidates of a query is the chosen one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm_calibration.data.candidates import Candidates
from vlm_calibration.losses.candidates import CandidateScores
from vlm_calibration.losses.sequence import AnswerWeight, response_nll, token_weights
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.stages.preference_targets import level_log_p


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
        """For each query whether the answer of each picked candidate is correct; one beside a wrong own answer is its opposite."""
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
    """The scores of the picked candidates, [B, K, T] for the largest number K of picks; a row with fewer ends with empty ones."""
    width = max(map(len, picks))
    index = torch.tensor([[*p, *[-1] * (width - len(p))] for p in picks], device=scores.tokens.device)
    rows = torch.arange(len(picks), device=index.device)[:, None]
    return ResponseScores(*(values[rows, index] * (index >= 0)[..., None] for values in scores))


def candidate_scores(policy: ResponseScores, comparison: Comparison) -> CandidateScores:
    """Arguments of the loss, [B, K], from the scores [B, K, T] of the compared candidates."""
    total, compared, reference = policy.total, comparison.compared, comparison.reference
    table = partial(_table, total)
    answer_lengths = table((c.answer_length for c in row) for row in compared)
    is_answer = torch.arange(policy.tokens.shape[-1], device=total.device) < answer_lengths[..., None]
    return CandidateScores(
        policy=total,
        reference=None if reference is None else reference.total,
        lengths=policy.lengths,
        distance=table(
            (1.0 if c.wrong else abs(c.confidence - row[0].confidence) for c in row) for row in compared
        ),
        valid=policy.lengths > 0,
        answer=torch.where(is_answer, policy.log_likelihood, 0.0).sum(-1),
        confidence=table((c.confidence for c in row) for row in compared),
        target=total.new_tensor(comparison.targets),
        correct=table(comparison.correct).bool(),
        own=table((not c.wrong for c in row) for row in compared).bool(),
    )


def _table(like: Tensor, values: Iterable[Iterable[float]]) -> Tensor:
    """Values of the candidates of each query, [B, K] as another table; 0 where a query has fewer."""
    rows = [list(row) for row in values]
    return like.new_tensor([row + [0.0] * (like.shape[1] - len(row)) for row in rows])


def chosen_nll(
    policy: ResponseScores, comparison: Comparison, answer_weight: AnswerWeight, confidence_weight: float
) -> Tensor:
    """Negative log-likelihood per token of the chosen responses, with the token weights of stage 1, averaged over queries."""
    log_likelihood, tokens = policy.log_likelihood[:, 0], policy.tokens[:, 0]  # [B, T]
    chosen = [row[0] for row in comparison.compared]
    answer_lengths = torch.tensor([c.answer_length for c in chosen], device=tokens.device)
    confidence_mask = torch.arange(tokens.shape[1], device=tokens.device) >= answer_lengths[:, None]
    confidence = log_likelihood.new_tensor([[c.confidence] for c in chosen])
    correct = torch.tensor(comparison.is_correct, device=tokens.device)[:, None]
    weights = token_weights(confidence_mask, confidence, correct, answer_weight, confidence_weight)
    rows, _ = tokens.nonzero(as_tuple=True)
    return response_nll(log_likelihood[tokens], rows, weights[tokens], len(chosen))


def shared_text_drift(policy: ResponseScores, comparison: Comparison) -> Tensor:
    """How far the policy is from keeping what the responses to a query share, averaged over queries.

    The answer before the confidence: the squared change of its log-likelihood since the reference. The ending ("%", the end of the
    turn): its negative log-likelihood, averaged over the responses, since the reference may end a number badly that it never states.
    Numbers without "%", or in place of the answer, would satisfy a preference between confidences too.
    """
    assert comparison.reference is not None
    log_p, compared = policy.log_likelihood, comparison.compared
    position = torch.arange(log_p.shape[-1], device=log_p.device)
    answer = position < log_p.new_tensor([[row[0].answer_length] for row in compared])  # [B, T]
    starts = policy.lengths - _table(policy.total, ((c.ending_length for c in row) for row in compared))
    ending = policy.tokens & (position >= starts[..., None])  # [B, K, T]
    # The reference may have scored longer responses in the same batch.
    change = log_p[:, 0] - comparison.reference.log_likelihood[:, 0, : log_p.shape[-1]]
    answers = (change * answer).sum(-1).square()  # [B]
    endings = (log_p * ending).sum((-1, -2))  # [B]
    return (answers - endings / log_p.new_tensor([len(row) for row in compared])).mean()


@torch.no_grad()
def answer_log_likelihood(policy: ResponseScores, comparison: Comparison) -> Tensor:
    """Log-likelihood of the gold answers' tokens, averaged over the queries whose responses give one; NaN without such a query."""
    values = [
        policy.log_likelihood[row, 0, : candidates[0].answer_length].sum()
        for row, candidates in enumerate(comparison.compared)
        if comparison.is_correct[row]
    ]
    return torch.stack(values).mean() if values else policy.log_likelihood.new_tensor(math.nan)


@torch.no_grad()
def kl_divergence(policy: Tensor, reference: Tensor, candidates: Candidates) -> Tensor:
    """KL divergence of the reference's distribution over levels from the policy's, in nats, averaged over queries."""
    log_p, log_q = (
        [torch.log_softmax(x.float(), -1) for _, x in level_log_p(total, candidates)]
        for total in (policy, reference)
    )
    return torch.stack([(p.exp() * (p - q)).sum() for p, q in zip(log_p, log_q, strict=True)]).mean()
