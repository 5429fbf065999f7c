"""The terms of stage 2's loss, from the token scores of candidates, against loops over tokens."""

from __future__ import annotations

import pytest
import torch

from vlm_calibration.data.candidates import Candidate
from vlm_calibration.losses.distribution import SoftLabel
from vlm_calibration.losses.sequence import AnswerWeight
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.stages.dpo_terms import Comparison, candidate_scores, chosen_nll, shared_text_drift


def _candidate(length: int, answer: int, ending: int, confidence: float, wrong: bool = False) -> Candidate:
    return Candidate((1,) * length, answer, ending, confidence, wrong)


# The second query has fewer candidates, the first another answer that is longer than its own.
CANDIDATES = (
    (
        *(_candidate(5, 2, 2, 0.7), _candidate(5, 2, 1, 0.0), _candidate(6, 2, 2, 1.0)),
        _candidate(7, 4, 3, 0.7, wrong=True),
    ),
    (_candidate(4, 1, 0, 0.2), _candidate(5, 1, 2, 0.5)),
)
ALL = ((0, 1, 2, 3), (0, 1))
COMPARED = Comparison(CANDIDATES, ALL, (0.64, 0.2), (True, False))
CORRECT = [[True, True, True, False], [False, False]]


def _response_scores(seed: int, compared: Comparison = COMPARED, longest: int = 7) -> ResponseScores:
    tokens = torch.zeros(2, max(map(len, compared.picks)), longest, dtype=torch.bool)
    for row, candidates in enumerate(compared.compared):
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


def test_the_tokens_of_the_answer_get_no_gradient() -> None:
    policy = _response_scores(0)
    SoftLabel(width=0.5)(candidate_scores(policy, COMPARED)).backward()
    gradient = policy.log_likelihood.grad
    assert gradient is not None
    for row, candidates in enumerate(CANDIDATES):
        for k, candidate in enumerate(candidates):
            length, answer = len(candidate.tokens), candidate.answer_length
            taught = [not candidate.wrong and i >= answer for i in range(length)]
            assert (gradient[row, k, :length] != 0).tolist() == taught


@pytest.mark.parametrize(("answer_weight", "confidence_weight"), [("constant", 2.5), ("confidence", 1.0)])
def test_the_likelihood_of_the_chosen_responses_has_the_weights_of_stage_1(
    answer_weight: AnswerWeight, confidence_weight: float
) -> None:
    policy, expected = _response_scores(0), 0.0
    for row, (chosen, *_) in enumerate(CANDIDATES):
        log_p = policy.log_likelihood[row, 0].tolist()
        weight = (1.0 if answer_weight == "constant" else chosen.confidence) * COMPARED.is_correct[row]
        answer, rest = sum(log_p[: chosen.answer_length]), sum(log_p[chosen.answer_length :])
        expected -= (weight * answer + confidence_weight * rest) / len(chosen.tokens) / 2
    value = chosen_nll(policy, COMPARED, answer_weight, confidence_weight)
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("picks", [ALL, ((0,), (1,))], ids=["all", "chosen alone"])
@pytest.mark.parametrize("longer", [0, 3])
def test_drift_against_a_sum_spelled_out(picks: tuple[tuple[int, ...], ...], longer: int) -> None:
    """The reference may have scored longer responses."""
    compared = COMPARED._replace(picks=picks)
    policy, reference = _response_scores(0, compared), _response_scores(1, compared, 7 + longer)
    total, counted = 0.0, torch.zeros_like(policy.tokens)
    for row, candidates in enumerate(compared.compared):
        for k, (tokens, answer, ending, *_) in enumerate(candidates):
            n = len(tokens)
            now, before = (s.log_likelihood[row, k, :n].tolist() for s in (policy, reference))
            if k == 0:
                total += (sum(now[:answer]) - sum(before[:answer])) ** 2
                counted[row, k, :answer] = True
            total -= sum(now[n - ending :]) / len(candidates)
            counted[row, k, n - ending : n] = True
    value = shared_text_drift(policy, compared._replace(reference=reference))
    assert float(value) == pytest.approx(total / 2, rel=1e-5)
    value.backward()
    gradient = policy.log_likelihood.grad
    assert gradient is not None
    assert torch.equal(gradient != 0, counted), "no other token counts"
