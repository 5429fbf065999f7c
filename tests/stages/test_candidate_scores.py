"""The argument of stage 2's loss, from the token scores of candidates, against loops over tokens."""

from __future__ import annotations

import pytest
import torch

from vlm_calibration.data.candidates import Candidate
from vlm_calibration.losses.distribution import ExpectedBrier, SoftLabel, TokenizedBrier
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.stages.dpo_terms import candidate_scores
from vlm_calibration.stages.preference_targets import Comparison


def _candidate(length: int, answer: int, confidence: float, wrong: bool = False) -> Candidate:
    return Candidate((1,) * length, answer, 1, confidence, wrong)


# The second query has fewer candidates, the first another answer that is longer than its own.
CANDIDATES = (
    (_candidate(5, 2, 0.7), _candidate(5, 2, 0.0), _candidate(6, 2, 1.0), _candidate(7, 4, 0.7, wrong=True)),
    (_candidate(4, 1, 0.2), _candidate(5, 1, 0.5)),
)
COMPARED = Comparison(CANDIDATES, ((0, 1, 2, 3), (0, 1)), (0.64, 0.2), (True, False))
CORRECT = [[True, True, True, False], [False, False]]


def _response_scores(seed: int) -> ResponseScores:
    tokens = torch.zeros(2, 4, 7, dtype=torch.bool)
    for row, candidates in enumerate(CANDIDATES):
        for k, candidate in enumerate(candidates):
            tokens[row, k, : len(candidate.tokens)] = True
    values = -torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
    return ResponseScores(values.masked_fill(~tokens, 0.0).requires_grad_(), tokens)


def test_scores_are_sums_over_tokens() -> None:
    policy, reference = _response_scores(0), _response_scores(1)
    assert candidate_scores(policy, COMPARED).reference is None
    scores = candidate_scores(policy, COMPARED._replace(reference=reference))
    assert scores.reference is not None
    assert scores.valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert scores.target.tolist() == pytest.approx(COMPARED.targets)
    for row, candidates in enumerate(CANDIDATES):
        for k, candidate in enumerate(candidates):
            log_p = policy.log_likelihood[row, k].tolist()
            before = sum(reference.log_likelihood[row, k].tolist())
            assert scores.policy[row, k].tolist() == pytest.approx(sum(log_p), rel=1e-5)
            assert scores.reference[row, k].tolist() == pytest.approx(before, rel=1e-5)
            answer = sum(log_p[: candidate.answer_length])
            assert scores.answer[row, k].tolist() == pytest.approx(answer, rel=1e-5)
            distance = 1.0 if candidate.wrong else abs(candidate.confidence - candidates[0].confidence)
            assert float(scores.distance[row, k]) == pytest.approx(distance)
            assert float(scores.confidence[row, k]) == pytest.approx(candidate.confidence)
            assert int(scores.lengths[row, k]) == len(candidate.tokens)
            assert bool(scores.correct[row, k]) == CORRECT[row][k]
            assert bool(scores.own[row, k]) != candidate.wrong


@pytest.mark.parametrize("loss", [SoftLabel(width=0.5), TokenizedBrier(), ExpectedBrier()], ids=repr)
def test_the_tokens_of_the_answer_get_no_gradient(loss: SoftLabel | TokenizedBrier | ExpectedBrier) -> None:
    policy = _response_scores(0)
    loss(candidate_scores(policy, COMPARED)).backward()
    gradient = policy.log_likelihood.grad
    assert gradient is not None
    for row, candidates in enumerate(CANDIDATES):
        for k, candidate in enumerate(candidates):
            taught = [
                not candidate.wrong and i >= candidate.answer_length for i in range(len(candidate.tokens))
            ]
            assert (gradient[row, k, : len(taught)] != 0).tolist() == taught
