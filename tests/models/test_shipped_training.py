"""Both stages trained with the shipped presets: nf4, bfloat16 and gradient checkpointing together."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.data.collate import PromptCollator, SFTCollator
from vlm_calibration.losses.sequence import token_log_likelihood
from vlm_calibration.models.forward import labelled_logits, unwrap_peft
from vlm_calibration.models.generation import generate
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import OptimizerSettings

from .families import randomize_adapters
from .processors import cached_family
from .runs import LORA, data_of, fit, write_records

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


@pytest.mark.parametrize("name", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.nightly)])
def test_shared_and_plain_scores_train_alike(name: str, tmp_path: Path) -> None:
    """Losses agree within 1%, gradients within 5% of their norm; the rest is rounding in bfloat16."""
    qlora, preset = (
        yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("qlora", "qwen2_5_vl_7b")
    )
    settings, precision = qlora["model"]["init_args"]["base"], preset["trainer"]["precision"]
    checkpointing = preset["model"]["init_args"]["gradient_checkpointing"]
    expected = {"quantization": "nf4", "dtype": "bfloat16"}
    assert (settings, precision, checkpointing) == (expected, "bf16-mixed", True)
    family, records = cached_family(name), write_records(tmp_path)
    base = BaseModel(family.save(tmp_path / "base"), **settings)
    torch.manual_seed(0)
    sft = SFTModule(
        base, LORA, OptimizerSettings(lr=1e-2, warmup_fraction=0.0), gradient_checkpointing=checkpointing
    )
    runs = {"sft": (sft, fit(sft, data_of(base.name_or_path, records), 6, precision))}
    sft.model.save_pretrained(tmp_path / "adapter")
    for scoring in ("shared", "plain"):
        dpo = DPOModule(
            base,
            str(tmp_path / "adapter"),
            pairs=PairPolicy(target="level"),
            optimizer=OptimizerSettings(lr=1e-3, warmup_fraction=0.0),
            nll_weight=1.0,  # without it the first loss is log 2 for any scores
            scoring=scoring,  # type: ignore[arg-type]
            gradient_checkpointing=checkpointing,
        )
        data = data_of(base.name_or_path, records, CandidateSettings())
        runs[scoring] = dpo, fit(dpo, data, 3, precision)  # type: ignore[assignment]

    for module, watch in runs.values():
        model = unwrap_peft(module.model)
        layers = [m for m in model.get_decoder().modules() if isinstance(m, Linear4bit)]
        assert len(layers) == len([m for m in model.modules() if isinstance(m, Linear4bit)]) == 2 * 7
        assert {(m.compute_dtype, m.weight.quant_type) for m in layers} == {(torch.bfloat16, "nf4")}
        assert model.is_gradient_checkpointing
        assert all(math.isfinite(loss) for loss in watch.losses)
        assert watch.losses[-1] < watch.losses[0]
        assert len(watch.gradients) == 2 * 2 * 7
        assert all(gradient.isfinite().all() for gradient in watch.gradients.values())
        moved = {n for n, p in module.named_parameters() if not torch.equal(p, watch.before[n])}
        assert moved == set(watch.gradients), "only the adapter"
    shared, plain = runs["shared"][1], runs["plain"][1]
    assert shared.losses == pytest.approx(plain.losses, rel=0.01)
    differences = [shared.gradients[n] - g for n, g in plain.gradients.items()]
    difference, norm = (
        math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for gradients in (differences, plain.gradients.values())
    )
    assert difference < 0.05 * norm


def test_gradients_are_as_before_after_a_pass_in_eval_mode(tmp_path: Path) -> None:
    """As in validation between steps; on some CPUs bitsandbytes would repack weights in eval mode."""
    base = BaseModel(cached_family("qwen2_5_vl").save(tmp_path / "base"), "float32", "nf4")
    data, module = data_of(base.name_or_path, write_records(tmp_path)), SFTModule(base, LORA)
    fit(module, data, 1)
    dataset = data.train_dataloader().dataset
    samples = [dataset[0, i] for i in range(4)]
    batch, prompts = SFTCollator(data.chat, data.max_length)(samples), PromptCollator(data.chat)(samples)
    randomize_adapters(module.model)
    gradients = []
    for _ in range(2):
        module.model.train()
        module.zero_grad(set_to_none=True)
        labelled = labelled_logits(module.model, batch.inputs, batch.labels)
        (-token_log_likelihood(labelled.logits, labelled.targets).mean()).backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
        module.model.eval()
        generate(module.model, prompts.inputs, data.processor.tokenizer, 2)
    before, after = gradients
    assert any(g.abs().max() > 0 for g in before.values())
    for name, gradient in before.items():
        assert torch.allclose(after[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=0), name
