"""The shipped demo model, which states its confidence, with an adapter that makes it answer differently."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from vlm_calibration.inference.model import CalibratedModel


@pytest.fixture(scope="session")
def adapter_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with an adapter of the demo's model, with its processor and card, as training leaves it."""
    from vlm_calibration.data.module import PerturbedQueryDataModule
    from vlm_calibration.inference.model import DEMO_MODEL
    from vlm_calibration.models.adapters import LoraSettings, attach_lora
    from vlm_calibration.models.loading import BaseModel, load_base
    from vlm_calibration.reporting.card import EXAMPLE, Card, save_card

    folder = tmp_path_factory.mktemp("run")
    model = attach_lora(load_base(BaseModel(str(DEMO_MODEL))), LoraSettings(r=4, alpha=4, dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.13
    model.save_pretrained(folder / "adapter")
    data = PerturbedQueryDataModule(str(DEMO_MODEL))
    data.processor.save_pretrained(folder / "adapter")
    card = Card(str(DEMO_MODEL), template=data.prompt.template, conversation=data.chat.render(EXAMPLE))
    save_card(folder / "adapter", card)
    return folder


@pytest.fixture(scope="session")
def calibrated(adapter_run: Path) -> CalibratedModel:
    from vlm_calibration.inference.model import load_calibrated

    return load_calibrated(adapter=adapter_run, device="cpu", max_new_tokens=16)
