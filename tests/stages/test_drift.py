"""The anchor against a sum that is spelled out."""

from __future__ import annotations

import pytest
import torch

from vlm_calibration.data.pairs import Candidate
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.stages.drift import logp_drift


def _scores(lengths: list[list[int]], longest: int, seed: int) -> ResponseScores:
    tokens = torch.zeros(len(lengths), max(map(len, lengths)), longest, dtype=torch.bool)
    for row, of_query in enumerate(lengths):
        for k, length in enumerate(of_query):
            tokens[row, k, :length] = True
    values = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed))
    return ResponseScores(values.masked_fill(~tokens, 0.0), tokens)


# (tokens, of the answer, of the ending) of each candidate; queries may have unequally many
COMPARED = [
    [[(6, 2, 2), (5, 2, 2), (6, 2, 1)], [(4, 1, 0), (7, 3, 3)]],
    [[(5, 1, 2)], [(3, 1, 1)]],
]


@pytest.mark.parametrize("compared", COMPARED, ids=["unlike", "chosen alone"])
@pytest.mark.parametrize("longer", [0, 3])
def test_a_sum_spelled_out(compared: list[list[tuple[int, int, int]]], longer: int) -> None:
    candidates = [
        [Candidate((1,) * n, answer, ending, 0.5, False) for n, answer, ending in of_query]
        for of_query in compared
    ]
    lengths = [[n for n, *_ in of_query] for of_query in compared]
    longest = max(n for of_query in lengths for n in of_query)
    found, reference = _scores(lengths, longest, 0), _scores(lengths, longest + longer, 1)
    found.log_likelihood.requires_grad_()

    total = 0.0
    counted = torch.zeros_like(found.tokens)
    for row, of_query in enumerate(compared):
        endings = 0.0
        for k, (n, answer, ending) in enumerate(of_query):
            now, before = (s.log_likelihood[row, k, :n].tolist() for s in (found, reference))
            if k == 0:
                total += (sum(now[:answer]) - sum(before[:answer])) ** 2
                counted[row, k, :answer] = True
            if ending:
                endings += (sum(now[-ending:]) - sum(before[-ending:])) ** 2
                counted[row, k, n - ending : n] = True
        total += endings / len(of_query)

    value = logp_drift(found, reference, candidates)
    assert float(value) == pytest.approx(total / len(compared), rel=1e-5)
    value.backward()
    gradient = found.log_likelihood.grad
    assert gradient is not None
    assert torch.equal(gradient != 0, counted), "no other token is held"


def test_nothing_that_has_not_changed() -> None:
    scores = _scores([[4, 4]], 4, 0)
    same = [[Candidate((1,) * 4, 1, 2, c, False) for c in (1.0, 0.5)]]
    assert float(logp_drift(scores, scores, same)) == 0
