"""The argument of stage 2's loss, from the token scores of candidates, against loops over tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from vlm_calibration.data.candidates import Candidate
from vlm_calibration.losses.distribution import ExpectedBrier, SoftLabel, TokenizedBrier
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.stages.dpo_terms import candidate_scores


def _candidate(length: int, answer: int, confidence: float, wrong: bool = False) -> Candidate:
    return Candidate((1,) * length, answer, 1, confidence, wrong)


# The second query has fewer candidates, the first another answer that is longer than its own.
COMPARED = (
    (_candidate(5, 2, 0.7), _candidate(5, 2, 0.0), _candidate(6, 2, 1.0), _candidate(7, 4, 0.7, wrong=True)),
    (_candidate(4, 1, 0.2), _candidate(5, 1, 0.5)),
)
TARGETS = [0.64, 0.2]
CORRECT = [[True, True, True, False], [False, False]]


def _response_scores(seed: int) -> ResponseScores:
    tokens = torch.zeros(2, 4, 7, dtype=torch.bool)
    for row, candidates in enumerate(COMPARED):
        for k, candidate in enumerate(candidates):
            tokens[row, k, : len(candidate.tokens)] = True
    values = -torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
    return ResponseScores(values.masked_fill(~tokens, 0.0).requires_grad_(), tokens)


@pytest.mark.parametrize("with_reference", [False, True])
def test_scores_are_sums_over_tokens(with_reference: bool) -> None:
    policy, reference = _response_scores(0), _response_scores(1)
    scores = candidate_scores(policy, reference if with_reference else None, COMPARED, TARGETS, CORRECT)
    assert (scores.reference is not None) == with_reference
    assert scores.valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert scores.target.tolist() == pytest.approx(TARGETS)
    for row, candidates in enumerate(COMPARED):
        for k, candidate in enumerate(candidates):
            log_p = policy.log_likelihood[row, k].tolist()
            assert float(scores.policy[row, k].detach()) == pytest.approx(sum(log_p), rel=1e-5)
            answer = sum(log_p[: candidate.answer_length])
            assert float(scores.answer[row, k].detach()) == pytest.approx(answer, rel=1e-5)
            if scores.reference is not None:
                expected = sum(reference.log_likelihood[row, k].tolist())
                assert float(scores.reference[row, k].detach()) == pytest.approx(expected, rel=1e-5)
            distance = 1.0 if candidate.wrong else abs(candidate.confidence - candidates[0].confidence)
            assert float(scores.distance[row, k]) == pytest.approx(distance)
            assert float(scores.confidence[row, k]) == pytest.approx(candidate.confidence)
            assert int(scores.lengths[row, k]) == len(candidate.tokens)
            assert bool(scores.correct[row, k]) == CORRECT[row][k]
            assert bool(scores.own[row, k]) != candidate.wrong


@pytest.mark.parametrize("loss", [SoftLabel(width=0.5), TokenizedBrier(), ExpectedBrier()], ids=repr)
def test_the_tokens_of_the_answer_get_no_gradient(loss: SoftLabel | TokenizedBrier | ExpectedBrier) -> None:
    policy = _response_scores(0)
    loss(candidate_scores(policy, None, COMPARED, TARGETS, CORRECT)).backward()
    gradient = policy.log_likelihood.grad
    assert gradient is not None
    for row, candidates in enumerate(COMPARED):
        for k, candidate in enumerate(candidates):
            taught = [
                not candidate.wrong and i >= candidate.answer_length for i in range(len(candidate.tokens))
            ]
            assert (gradient[row, k, : len(taught)] != 0).tolist() == taught


@pytest.mark.parametrize(
    ("targets", "correct"), [([0.5], CORRECT), (TARGETS, CORRECT[:1]), (TARGETS, [[True] * 4, [True] * 4])]
)
def test_labels_of_other_candidates_are_refused(
    targets: Sequence[float], correct: Sequence[Sequence[bool]]
) -> None:
    with pytest.raises(ValueError, match="every query needs a target"):
        candidate_scores(_response_scores(0), None, COMPARED, targets, correct)
