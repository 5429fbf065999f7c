"""The loss of stage 2 on the demo model, its terms, its statistics, and its gradients.

Likelihoods are checked against plain forwards over whole conversations, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from vlm_calibration.data.candidates import Candidate
from vlm_calibration.losses.preference import DPO
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.records import DataError
from vlm_calibration.stages.dpo_terms import shared_text_drift
from vlm_calibration.stages.preference_targets import Comparison, PairPolicy
from vlm_calibration.stages.training import trained_parameters

from .preference import MakeModule, Observed

Observe = Callable[..., Observed]
LEVEL = PairPolicy(target="level")


@pytest.mark.slow
def test_loss_and_statistics_by_hand(observe: Observe) -> None:
    beta = 0.4
    observed = observe(5, wrong_answer=True, loss=DPO(beta=beta), pairs=LEVEL)
    loss = float(observed.step())
    terms: dict[str, list[float]] = {
        name: [] for name in ("loss", "reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected")
    }
    answers = []
    for row, responses in enumerate(observed.compared()):
        policy_p, answer_p, _ = zip(*(observed.plain(row, c) for c in responses), strict=True)
        reference_p = [observed.plain(row, c, reference=True)[0] for c in responses]
        rewards = beta * (np.array(policy_p) - np.array(reference_p))
        margin = rewards[0] - rewards[1:]
        terms["loss"].append(np.log1p(np.exp(-margin)).mean())
        terms["reward_margin"].append(margin.mean())
        terms["reward_accuracy"].append((margin > 0).mean())
        terms["logp_chosen"].append(policy_p[0])
        terms["logp_rejected"].append(np.mean(policy_p[1:]))
        if observed.samples[row].wrong_answer is None:
            answers.append(answer_p[0])
    expected = {f"train/{name}": float(np.mean(values)) for name, values in terms.items()}
    expected |= {"train/logp_answer": float(np.mean(answers)), "train/skipped": 0.0, "train/cut_off": 0.0}
    assert 0 < len(answers) < 5
    assert observed.logged == pytest.approx(expected, abs=2e-3)
    assert loss == pytest.approx(expected["train/loss"], abs=1e-4)
    assert abs(loss - math.log(2)) > 0.01


@pytest.mark.parametrize(
    ("settings", "constant", "confidence_weight"),
    [({}, False, 1.0), ({"answer_weight": "constant", "confidence_weight": 2.5}, True, 2.5)],
)
def test_the_nll_term_weights_tokens_as_in_stage_1(
    observe: Observe, settings: dict[str, Any], constant: bool, confidence_weight: float
) -> None:
    without = float(observe(9, nll_weight=0.0, pairs=LEVEL, **settings).step())
    observed = observe(9, nll_weight=0.7, pairs=LEVEL, **settings)
    loss = float(observed.step())
    nll, weights = [], []
    for row, [first, *_] in enumerate(observed.compared()):
        log_p, answer_p, length = observed.plain(row, first)
        sample = observed.samples[row]
        weight = (1.0 if constant else sample.confidence) * (sample.wrong_answer is None)
        weights.append(weight)
        nll.append(-(weight * answer_p + confidence_weight * (log_p - answer_p)) / length)
    assert 0 < sum(weight > 0 for weight in weights) < 9, "wrong answers have no weight"
    assert loss - without == pytest.approx(0.7 * np.mean(nll), abs=1e-3)


def test_gradients_reach_the_policy_alone(observe: Observe) -> None:
    observed = observe(nll_weight=0.1)
    observed.step().backward()
    for name, parameter in observed.module.named_parameters():
        assert parameter.requires_grad == (".default." in name)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".default." in name)


def test_only_the_chosen_parts_are_trained(make_module: MakeModule, demo_adapter: Callable[..., str]) -> None:
    module = make_module(demo_adapter(parts=["language", "tower", "projector"]), parts=["projector"])
    module.configure_model()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert trained == {
        name for name, _ in module.named_parameters() if "projector" in name and ".default." in name
    }
    with pytest.raises(DataError, match=r"model\.parts needs a given adapter"):
        make_module(None, reference="base", parts=["projector"])


def test_a_batch_whose_samples_are_all_too_long_teaches_nothing(observe: Observe) -> None:
    observed = observe(data={"max_length": 70, "on_too_long": "skip"})
    assert observed.batch.inputs == {}
    loss = observed.step()
    assert float(loss) == 0
    loss.backward()
    parameters = trained_parameters(observed.module)
    assert parameters
    assert all(p.grad is not None and not p.grad.any() for p in parameters), "processes stay in step"
    assert observed.module.skipped == 4


# (tokens, answer length, ending length) of each candidate; queries can have unequally many
COMPARED = [
    [[(6, 2, 2), (5, 2, 2), (6, 2, 1)], [(4, 1, 0), (7, 3, 3)]],
    [[(5, 1, 2)], [(3, 1, 1)]],
]


@pytest.mark.parametrize("compared", COMPARED, ids=["unlike", "chosen alone"])
@pytest.mark.parametrize("longer", [0, 3])
def test_drift_against_a_sum_spelled_out(compared: list[list[tuple[int, int, int]]], longer: int) -> None:
    lengths = [[n for n, *_ in of_query] for of_query in compared]

    def scores(longest: int, seed: int) -> ResponseScores:
        tokens = torch.zeros(2, max(map(len, lengths)), longest, dtype=torch.bool)
        for row, of_query in enumerate(lengths):
            for k, length in enumerate(of_query):
                tokens[row, k, :length] = True
        values = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed))
        return ResponseScores(values.masked_fill(~tokens, 0.0), tokens)

    longest = max(n for of_query in lengths for n in of_query)
    policy, reference = scores(longest, 0), scores(longest + longer, 1)
    policy.log_likelihood.requires_grad_()
    total = 0.0
    counted = torch.zeros_like(policy.tokens)
    for row, of_query in enumerate(compared):
        endings = 0.0
        for k, (n, answer, ending) in enumerate(of_query):
            now, before = (s.log_likelihood[row, k, :n].tolist() for s in (policy, reference))
            if k == 0:
                total += (sum(now[:answer]) - sum(before[:answer])) ** 2
                counted[row, k, :answer] = True
            if ending:
                endings -= sum(now[-ending:])
                counted[row, k, n - ending : n] = True
        total += endings / len(of_query)

    candidates = tuple(
        tuple(Candidate((1,) * n, answer, ending, 0.5, False) for n, answer, ending in of_query)
        for of_query in compared
    )
    picks = tuple(tuple(range(len(of_query))) for of_query in compared)
    value = shared_text_drift(policy, Comparison(candidates, picks, (0.5, 0.5), (True, True), reference))
    assert float(value) == pytest.approx(total / 2, rel=1e-5)
    value.backward()
    gradient = policy.log_likelihood.grad
    assert gradient is not None
    assert torch.equal(gradient != 0, counted), "no other token counts"
