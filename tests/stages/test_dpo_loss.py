"""The loss of stage 2 on the demo model, its statistics, and its gradients.

Likelihoods are checked against plain forwards over whole conversations, one at a time.
"""

from __future__ import annotations

import numpy as np
import pytest

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.losses.preference import DPO
from vlm_calibration.records import DataError
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.stages.training import trained_parameters

from .own import MakeStep
from .preference import MakeModule, NewAdapter


@pytest.mark.slow
def test_loss_and_statistics_by_hand(make_step: MakeStep) -> None:
    """With the likelihood of the chosen responses and the drift of what the responses share."""
    weights = {"nll_weight": 0.7, "drift_weight": 0.3}
    loss, level = DPO(beta=0.4), PairPolicy(target="level")
    step = make_step(CandidateSettings(wrong_answer=True), 5, loss=loss, pairs=level, **weights)
    value = float(step.step())
    names = ("loss", "reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected")
    terms: dict[str, list[float]] = {name: [] for name in names}
    answers = []
    for row, responses in enumerate(step.compare()[1].compared):
        policy, reference = ([step.log_p(row, c, of) for c in responses] for of in (False, True))
        policy_p, reference_p = (np.array([sum(log_p) for log_p in scores]) for scores in (policy, reference))
        rewards = 0.4 * (policy_p - reference_p)
        margin = rewards[0] - rewards[1:]
        chosen, is_correct = responses[0], step.samples[row].wrong_answer is None
        answer, before = (sum(scores[0][: chosen.answer_length]) for scores in (policy, reference))
        nll = -(answer * chosen.confidence * is_correct + policy_p[0] - answer) / len(policy[0])
        ends = [sum(p[len(p) - c.ending_length :]) for p, c in zip(policy, responses, strict=True)]
        drift = (answer - before) ** 2 - np.mean(ends)
        terms["loss"].append(np.log1p(np.exp(-margin)).mean() + 0.7 * nll + 0.3 * drift)
        terms["reward_margin"].append(margin.mean())
        terms["reward_accuracy"].append((margin > 0).mean())
        terms["logp_chosen"].append(policy_p[0])
        terms["logp_rejected"].append(np.mean(policy_p[1:]))
        answers += [answer] * is_correct
    expected = {f"train/{name}": float(np.mean(values)) for name, values in terms.items()}
    expected |= {"train/logp_answer": float(np.mean(answers)), "train/skipped": 0.0, "train/cut_off": 0.0}
    assert 0 < len(answers) < 5
    assert step.logged == pytest.approx(expected, abs=2e-3)
    assert value == pytest.approx(expected["train/loss"], abs=1e-3)


def test_gradients_reach_the_policy_alone(make_step: MakeStep) -> None:
    step = make_step(n=4, nll_weight=0.1)
    step.step().backward()
    for name, parameter in step.module.named_parameters():
        assert parameter.requires_grad == (".default." in name)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".default." in name)


def test_only_the_chosen_parts_are_trained(make_module: MakeModule, demo_adapter: NewAdapter) -> None:
    module = make_module(demo_adapter(parts=["language", "tower", "projector"]), parts=["projector"])
    module.configure_model()
    names = {name for name, _ in module.named_parameters() if "projector" in name and ".default." in name}
    assert names
    assert {name for name, p in module.named_parameters() if p.requires_grad} == names
    with pytest.raises(DataError, match=r"model\.parts needs a given adapter"):
        make_module(None, reference="base", parts=["projector"])


def test_a_batch_whose_samples_are_all_too_long_teaches_nothing(make_step: MakeStep) -> None:
    step = make_step(n=4, data={"max_length": 70, "on_too_long": "skip"})
    assert step.batch.inputs == {}
    loss = step.step()
    assert float(loss) == 0
    loss.backward()
    parameters = trained_parameters(step.module)
    assert parameters
    assert all(p.grad is not None and not p.grad.any() for p in parameters), "processes stay in step"
    assert step.module.skipped == 4
