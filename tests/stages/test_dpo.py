"""Stage 2 on the demo model: what runs change, log, write and reject, and its loss against arithmetic.

Likelihoods are checked against plain forwards over whole conversations, one at a time.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from vlm_calibration.callbacks.adapter import AdapterWriter
from vlm_calibration.callbacks.checkpoint import RunCheckpoint
from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.data.candidates import Candidate, CandidateSettings
from vlm_calibration.estimators.predictions import read_predictions
from vlm_calibration.losses.distribution import SoftLabel
from vlm_calibration.losses.preference import DPO, SimPO
from vlm_calibration.losses.sequence import AnswerWeight
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.records import DataError
from vlm_calibration.stages.dpo_terms import Comparison, candidate_scores, chosen_nll, shared_text_drift
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.stages.training import trained_parameters

from .conftest import NOISE, OWN, Data, MakeModule, MakeTrainer, NewAdapter, Steps, adapter_weights
from .own import MakeStep

LOGGED = {"reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "logp_answer"}


def test_a_run_learns_changes_the_policy_alone_and_writes_its_files(
    make_module: MakeModule,
    demo_folder: str,
    adapter: str,
    candidates: Data,
    trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    seen, module = Steps(), make_module(loss=DPO(beta=1.0), pairs=PairPolicy("level"))
    run = trainer(
        *(seen, RunCheckpoint(), AdapterWriter(), PredictionWriter()),
        enable_checkpointing=True,
        max_epochs=5,
        check_val_every_n_epoch=5,
        num_sanity_val_steps=-1,
    )
    run.fit(module, datamodule=candidates(noise=replace(NOISE, wrong_answer_rate=0.0, clean_fraction=1.0)))
    assert len(seen.losses) == 15
    assert sum(seen.losses[-3:]) < 0.5 * sum(seen.losses[:3])

    saved = load_file(Path(adapter) / "adapter_model.safetensors")
    reference, policy = (adapter_weights(module, name) for name in ("reference", "default"))
    assert reference.keys() == policy.keys() == saved.keys()
    assert all(torch.equal(reference[name], saved[name]) for name in saved), "bit by bit"
    assert not any(torch.equal(policy[name], saved[name]) for name in saved)
    base = dict(load_base(BaseModel(demo_folder, dtype="float32")).named_parameters())
    for name, parameter in module.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace("base_layer.", "")]), name

    before, after = seen.validated
    for values in (before, after):
        assert {f"val/{name}" for name in LOGGED | {"kl"}} <= set(values)
    assert before["val/kl"] == pytest.approx(0, abs=1e-5)
    assert before["val/reward_margin"] == pytest.approx(0, abs=1e-3)
    assert after["val/kl"] > 1e-4
    assert {f"train/{name}" for name in LOGGED | {"loss", "skipped"}} <= set(after)

    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(checkpoint["state_dict"]) == trained
    assert all(".default." in name for name in trained)
    assert checkpoint["teacher"] is None

    predictions = read_predictions(tmp_path / "run" / "predictions.jsonl")
    assert [p.id for p in predictions] == [f"calibration-000000-{kind}" for kind in ("yes", "no", "corner")]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["n"] == 3, "of the last validation alone"
    assert metrics["accuracy"] == pytest.approx(sum(p.correct for p in predictions) / 3)

    folder = tmp_path / "run" / "adapter"
    assert (folder / "tokenizer.json").is_file(), "the processor is saved beside it"
    assert not (folder / "reference").exists()
    again = PeftModel.from_pretrained(load_base(BaseModel(demo_folder, dtype="float32")), folder)
    loaded = {name.replace(".default.", "."): p for name, p in again.named_parameters() if "lora_" in name}
    assert all(torch.equal(loaded[name], policy[name]) for name in saved)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["base", "none"])
def test_a_run_logs_before_and_after(
    make_module: MakeModule, candidates: Data, trainer: MakeTrainer, reference: Any
) -> None:
    """On own answers from the base model with a new adapter, and on gold answers without a reference."""
    is_new, seen = reference == "base", Steps()
    answers, loss = (replace(OWN, wrong_answer=True), DPO()) if is_new else (CandidateSettings(), SimPO())
    settings = {"loss": loss, "pairs": PairPolicy("expected" if is_new else "level", "uniform", 2)}
    if is_new:
        lora = LoraSettings(r=2, alpha=4, dropout=0.5, parts=["language", "projector"])
        settings |= {"folder": None, "lora": lora}
    module = make_module(reference=reference, **settings)
    run = trainer(seen, max_epochs=1, num_sanity_val_steps=-1)
    run.fit(module, datamodule=candidates(answers))
    assert len(seen.losses) == 3
    assert all(math.isfinite(loss) for loss in seen.losses)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in seen.gradients)
    before, after = seen.validated
    for values in (before, after):
        assert {f"val/{name}" for name in ("reward_margin", "logp_chosen", "accuracy", "ece")} <= set(values)
        assert ("val/kl" in values) == is_new
    assert after["val/logp_chosen"] != pytest.approx(before["val/logp_chosen"], abs=1e-3)
    assert set(module.model.peft_config) == {"default"}
    if is_new:
        assert before["val/kl"] == pytest.approx(0, abs=1e-5), "the policy is the reference at first"
        assert module.model.peft_config["default"].lora_dropout == 0
        trained = adapter_weights(module, "default")
        assert trained
        assert all(p.any() for p in trained.values())
        assert not any("vision_tower" in name for name in trained)


def test_the_title_says_what_is_taught_on_which_answers(make_module: MakeModule, candidates: Data) -> None:
    assert make_module(loss=SoftLabel()).title(candidates(OWN)) == "stage 2: soft labels on own answers"
    assert make_module(loss=DPO()).title(candidates()) == "stage 2: DPO on gold answers"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"loss": DPO()}, r"model\.reference: DPO needs one, found none"),
        ({"loss": SimPO(), "drift_weight": 0.3}, r"model\.drift_weight compares with the reference"),
        ({"loss": SimPO(), "pairs": PairPolicy(target="expected")}, r"model\.pairs: .* needs the reference"),
        (
            {"folder": None, "reference": "adapter"},
            r"model\.reference: adapter, but model\.adapter is not set",
        ),
        (
            {"folder": None, "reference": "base", "parts": ["projector"]},
            r"model\.parts needs a given adapter",
        ),
        (
            {"nll_weight": -0.1, "reference": "base"},
            r"model\.nll_weight must be a finite number of at least 0",
        ),
        (
            {"confidence_weight": math.nan, "reference": "base"},
            r"model\.confidence_weight must be a finite number",
        ),
        ({"drift_weight": math.inf, "reference": "base"}, r"model\.drift_weight must be a finite number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    make_module: MakeModule, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        make_module(**{"reference": "none", "pairs": PairPolicy(target="level"), **settings})


@pytest.mark.slow
def test_loss_and_statistics_by_hand(make_step: MakeStep) -> None:
    """With the likelihood of the chosen responses and the drift of what the responses share."""
    weights = {"nll_weight": 0.7, "drift_weight": 0.3, "answer_weight": "constant", "confidence_weight": 2.5}
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
        nll = -(answer * is_correct + 2.5 * (policy_p[0] - answer)) / len(policy[0])
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


def test_only_the_chosen_parts_are_trained(
    make_module: MakeModule, new_adapter: NewAdapter, demo_folder: str
) -> None:
    adapter = new_adapter(0, demo_folder, parts=["language", "tower", "projector"])
    module = make_module(adapter, parts=["projector"])
    module.configure_model()
    names = {name for name, _ in module.named_parameters() if "projector" in name and ".default." in name}
    assert names
    assert {name for name, p in module.named_parameters() if p.requires_grad} == names


def test_a_batch_whose_samples_are_all_too_long_teaches_nothing(make_step: MakeStep) -> None:
    step = make_step(n=4, data={"max_length": 1, "on_too_long": "skip"})
    assert step.batch.inputs == {}
    loss = step.step()
    assert float(loss) == 0
    loss.backward()
    parameters = trained_parameters(step.module)
    assert parameters
    assert all(p.grad is not None and not p.grad.any() for p in parameters), "processes stay in step"
    assert step.module.skipped == 4


# --- The terms of the loss, from token scores, against loops over tokens ---


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
