"""Runs of stage 2 on the demo model: what training changes, logs, writes and rejects."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from vlm_calibration.callbacks.adapter import AdapterWriter
from vlm_calibration.callbacks.checkpoint import RunCheckpoint
from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.losses.distribution import SoftLabel
from vlm_calibration.losses.preference import DPO, SimPO
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError
from vlm_calibration.stages.preference_targets import PairPolicy

from .preference import Data, MakeModule, Steps, adapter_weights

LOGGED = {"reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "logp_answer"}


@pytest.mark.parametrize(
    ("settings", "wrong_answer"),
    [
        ({"loss": DPO(beta=1.0), "pairs": PairPolicy("level")}, False),
        ({"reference": "none", "loss": SimPO(), "pairs": PairPolicy("level", "uniform", 2)}, True),
    ],
    ids=["adapter", "none"],
)
def test_a_run_learns_changes_the_policy_alone_and_writes_its_files(
    make_module: MakeModule,
    demo_folder: str,
    adapter: str,
    candidates: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    settings: dict[str, Any],
    wrong_answer: bool,
) -> None:
    seen, module = Steps(), make_module(**settings)
    epochs = 5 if module.reference == "adapter" else 1
    run = trainer(
        *(seen, RunCheckpoint(), AdapterWriter()),
        enable_checkpointing=True,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=-1,
    )
    noise = NoisePolicy(levels=LinearLevels(n_levels=5), distractor_probability=0.0, clean_fraction=1.0)
    run.fit(module, datamodule=candidates(CandidateSettings(wrong_answer=wrong_answer), noise=noise))
    assert len(seen.losses) == 3 * epochs
    assert epochs == 1 or sum(seen.losses[-3:]) < 0.5 * sum(seen.losses[:3])

    saved = load_file(Path(adapter) / "adapter_model.safetensors")
    reference = adapter_weights(module, "reference")
    assert reference.keys() == (saved.keys() if module.reference == "adapter" else set())
    assert all(torch.equal(reference[name], saved[name]) for name in reference), "bit by bit"
    policy_now = adapter_weights(module, "default")
    assert policy_now.keys() == saved.keys()
    assert not any(torch.equal(policy_now[name], saved[name]) for name in saved)
    base = dict(load_base(BaseModel(demo_folder, dtype="float32")).named_parameters())
    for name, parameter in module.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace("base_layer.", "")]), name

    before, after = seen.validated
    expected = LOGGED | ({"kl"} if module.reference != "none" else set())
    for values in (before, after):
        assert {f"val/{name}" for name in expected} <= set(values)
        assert ("val/kl" in values) == ("kl" in expected)
    if module.reference == "adapter":
        assert before["val/kl"] == pytest.approx(0, abs=1e-5)
        assert before["val/reward_margin"] == pytest.approx(0, abs=1e-3)
        assert after["val/kl"] > 1e-4
    assert {f"train/{name}" for name in LOGGED | {"loss", "skipped"}} <= set(after)

    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert set(checkpoint["state_dict"]) == set(trained)
    assert all(".default." in name for name in trained)
    assert checkpoint["teacher"] is None

    folder = tmp_path / "run" / "adapter"
    assert not (folder / "reference").exists()
    again = PeftModel.from_pretrained(load_base(BaseModel(demo_folder, dtype="float32")), folder)
    loaded = {name.replace(".default.", "."): p for name, p in again.named_parameters() if "lora_" in name}
    assert all(torch.equal(loaded[name], policy_now[name]) for name in saved)


def test_the_title_says_what_is_taught_on_which_answers(make_module: MakeModule, candidates: Data) -> None:
    own = candidates(CandidateSettings(answers="own"))
    assert make_module(loss=SoftLabel()).title(own) == "stage 2: soft labels on own answers"
    assert make_module(loss=DPO()).title(candidates()) == "stage 2: DPO on gold answers"


def test_a_missing_adapter_says_to_train_one_first(
    make_module: MakeModule, candidates: Data, trainer: Callable[..., L.Trainer], tmp_path: Path
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
