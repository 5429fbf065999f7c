"""Stage 2 on the demo model: its loss, statistics and gradients, and what runs change, log, write and reject.

Likelihoods are checked against plain forwards over whole conversations, one at a time.
"""

from __future__ import annotations

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
from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.losses.distribution import SoftLabel
from vlm_calibration.losses.preference import DPO, SimPO
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.records import DataError
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.stages.training import trained_parameters

from .own import MakeStep
from .preference import (
    GOLD,
    NOISE,
    OWN,
    WITH_OPPOSITE,
    Data,
    MakeModule,
    MakeTrainer,
    NewAdapter,
    Steps,
    adapter_weights,
)

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
        *(seen, RunCheckpoint(), AdapterWriter()),
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

    folder = tmp_path / "run" / "adapter"
    assert not (folder / "reference").exists()
    again = PeftModel.from_pretrained(load_base(BaseModel(demo_folder, dtype="float32")), folder)
    loaded = {name.replace(".default.", "."): p for name, p in again.named_parameters() if "lora_" in name}
    assert all(torch.equal(loaded[name], policy[name]) for name in saved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "settings"),
    [
        (OWN, {"loss": SoftLabel(), "pairs": PairPolicy("fitted"), "gradient_checkpointing": True}),
        (WITH_OPPOSITE, {"loss": DPO(), "pairs": PairPolicy("expected", "uniform", 2), "reference": "base"}),
        (GOLD, {"reference": "none", "loss": SimPO(), "pairs": PairPolicy("level", "uniform", 2)}),
    ],
    ids=repr,
)
def test_a_run_logs_before_and_after(
    make_module: MakeModule,
    candidates: Data,
    trainer: MakeTrainer,
    answers: CandidateSettings,
    settings: dict[str, Any],
) -> None:
    """From the adapter of stage 1, from the base model with a new adapter, and without a reference."""
    reference = settings.get("reference", "adapter")
    new = {"folder": None, "lora": LoraSettings(r=2, alpha=4, dropout=0.5, parts=["language", "projector"])}
    module, seen = make_module(**(new if reference == "base" else {}), **settings), Steps()
    run = trainer(seen, max_epochs=1, num_sanity_val_steps=-1)
    run.fit(module, datamodule=candidates(answers))
    assert len(seen.losses) == 3
    assert all(math.isfinite(loss) for loss in seen.losses)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in seen.gradients)
    before, after = seen.validated
    names = {"reward_margin", "logp_chosen", "accuracy", "ece"} | ({"kl"} if reference != "none" else set())
    for values in (before, after):
        assert {f"val/{name}" for name in names} <= set(values)
        assert ("val/kl" in values) == ("kl" in names)
    assert after["val/logp_chosen"] != pytest.approx(before["val/logp_chosen"], abs=1e-3)
    if reference != "none":
        assert before["val/kl"] == pytest.approx(0, abs=1e-5), "the policy is the reference at first"
    assert set(module.model.peft_config) == {"default", *(["reference"] if reference == "adapter" else [])}
    if reference == "base":
        assert module.model.peft_config["default"].lora_dropout == 0
        trained = adapter_weights(module, "default")
        assert trained
        assert all(p.any() for p in trained.values())
        assert not any("vision_tower" in name for name in trained)


def test_the_title_says_what_is_taught_on_which_answers(make_module: MakeModule, candidates: Data) -> None:
    assert make_module(loss=SoftLabel()).title(candidates(OWN)) == "stage 2: soft labels on own answers"
    assert make_module(loss=DPO()).title(candidates()) == "stage 2: DPO on gold answers"


def test_a_missing_adapter_says_to_train_one_first(
    make_module: MakeModule, candidates: Data, trainer: MakeTrainer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"no adapter at {tmp_path}/none .*: train one first"):
        trainer(max_steps=1).fit(make_module(f"{tmp_path}/none"), datamodule=candidates())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"folder": None}, r"model\.reference: adapter, but model\.adapter is not set"),
        ({"loss": DPO()}, r"model\.reference: DPO needs one, found none"),
        ({"loss": SimPO(), "drift_weight": 0.3}, r"model\.drift_weight compares with the reference"),
        ({"loss": SimPO(), "pairs": PairPolicy(target="expected")}, r"model\.pairs: .* needs the reference"),
    ],
)
def test_settings_that_need_a_reference_are_refused_without_one(
    make_module: MakeModule, settings: dict[str, Any], match: str
) -> None:
    reference = "adapter" if "folder" in settings else "none"
    level = PairPolicy(target="level")
    with pytest.raises(DataError, match=match):
        make_module(**{"reference": reference, "pairs": level, **settings})


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_that_is_negative_or_not_finite_is_refused(make_module: MakeModule, weight: float) -> None:
    for name in ("nll_weight", "confidence_weight", "drift_weight"):
        with pytest.raises(DataError, match=rf"model\.{name} must be a finite number of at least 0"):
            make_module(**{name: weight})


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


@pytest.mark.parametrize("answers", [GOLD, OWN], ids=repr)
def test_a_batch_whose_samples_are_all_too_long_teaches_nothing(
    make_step: MakeStep, answers: CandidateSettings
) -> None:
    step = make_step(answers, n=4, data={"max_length": 1, "on_too_long": "skip"})
    assert step.batch.inputs == {}
    loss = step.step()
    assert float(loss) == 0
    loss.backward()
    parameters = trained_parameters(step.module)
    assert parameters
    assert all(p.grad is not None and not p.grad.any() for p in parameters), "processes stay in step"
    assert step.module.skipped == 4
