"""Both stages trained with the shipped presets: nf4, bfloat16 and gradient checkpointing together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import OptimizerSettings

from .families import FOUR
from .processors import cached_family
from .runs import LORA, Watch, data_of, fit, write_records

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"


def shipped() -> tuple[dict[str, Any], str, bool]:
    """The base model settings of qlora.yaml, and the precision and checkpointing of a model's preset."""
    qlora, preset = (
        yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text())
        for name in ("qlora", "qwen2_5_vl_7b")
    )
    checkpointing = preset["model"]["init_args"]["gradient_checkpointing"]
    return qlora["model"]["init_args"]["base"], preset["trainer"]["precision"], checkpointing


Trained = dict[str, tuple[Any, Watch]]
"""Module and recorded training of "sft", and of stage 2 with each scoring, "shared" and "plain"."""


@pytest.fixture(scope="module", params=FOUR)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    settings, precision, checkpointing = shipped()
    family = cached_family(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    records = write_records(folder)
    base = BaseModel(family.save(folder / "base"), **settings)
    torch.manual_seed(0)
    sft = SFTModule(
        base, LORA, OptimizerSettings(lr=1e-2, warmup_fraction=0.0), gradient_checkpointing=checkpointing
    )
    runs: Trained = {"sft": (sft, fit(sft, data_of(base.name_or_path, records), 6, precision))}
    sft.model.save_pretrained(folder / "adapter")

    for scoring in ("shared", "plain"):
        module = DPOModule(
            base,
            str(folder / "adapter"),
            pairs=PairPolicy(target="level"),
            optimizer=OptimizerSettings(lr=1e-3, warmup_fraction=0.0),
            nll_weight=1.0,  # without it the first loss is log 2 for any scores
            scoring=scoring,  # type: ignore[arg-type]
            gradient_checkpointing=checkpointing,
        )
        data = data_of(base.name_or_path, records, CandidateSettings())
        runs[scoring] = module, fit(module, data, 3, precision)
    return runs


def test_the_shipped_combination_is_nf4_in_bfloat16_under_checkpointing() -> None:
    assert shipped() == ({"quantization": "nf4", "dtype": "bfloat16"}, "bf16-mixed", True)


def test_the_language_model_is_quantised_and_computes_in_bfloat16(trained: Trained) -> None:
    for module, _ in (trained["sft"], trained["shared"]):
        base = unwrap_peft(module.model)
        layers = [m for m in base.get_decoder().modules() if isinstance(m, Linear4bit)]
        assert len(layers) == len([m for m in base.modules() if isinstance(m, Linear4bit)]) == 2 * 7
        assert {m.compute_dtype for m in layers} == {torch.bfloat16}
        assert {m.weight.quant_type for m in layers} == {"nf4"}
        assert base.is_gradient_checkpointing


@pytest.mark.parametrize("stage", ["sft", "shared", "plain"])
def test_the_loss_falls_and_only_the_adapter_moves(trained: Trained, stage: str) -> None:
    module, watch = trained[stage]
    assert all(math.isfinite(loss) for loss in watch.losses)
    assert watch.losses[-1] < watch.losses[0]
    assert len(watch.gradients) == 2 * 2 * 7
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, watch.before[n])}
    assert moved == set(watch.gradients)
    assert all(gradient.isfinite().all() for gradient in watch.gradients.values())


def test_both_ways_of_scoring_train_alike(trained: Trained) -> None:
    """Losses agree within 1%, gradients within 5% of their norm; the rest is rounding in bfloat16."""
    shared, plain = trained["shared"][1], trained["plain"][1]
    assert shared.losses == pytest.approx(plain.losses, rel=0.01)
    difference, norm = (
        math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for gradients in (
            [shared.gradients[n] - g for n, g in plain.gradients.items()],
            list(plain.gradients.values()),
        )
    )
    assert difference < 0.05 * norm
