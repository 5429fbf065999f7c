"""Short runs of both stages for one model family, on four records with images of different sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.data.collate import PromptCollator, SFTCollator
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.base import BaseModel, Quantization
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import OptimizerSettings

from ..level_tables import OnlyAt
from ..trainers import plain_trainer
from .processors import SIZES, Family

NOISE = NoisePolicy(levels=OnlyAt(n_levels=3, drawn=(0.5,)), distractor_probability=0.0)
"""Every sample has half of the noise, so every response states 50%."""
LORA = LoraSettings(r=4, alpha=16, dropout=0.0)


def write_records(folder: Path) -> str:
    """Write four records with different images, questions and answers; return the path of their JSONL file."""
    rng = np.random.default_rng(0)
    texts = (
        ("A dog?", "Yes", "yes_no"),
        ("What is at the very top left?", "umbrella", "short"),
        ("Do you see a cup?", "No", "yes_no"),
        ("Say in a few words what this is.", "a cat, or two", "open"),
    )
    keys = ("id", "image", "question", "answer", "answer_type", "regions")
    lines = []
    for i, (text, (height, width)) in enumerate(zip(texts, SIZES, strict=True)):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        region = {"label": "it", "box": [2, 2, width - 2, height - 2]}
        lines.append(json.dumps(dict(zip(keys, (f"q{i}", f"{i}.png", *text, [region]), strict=True))))
    path = folder / "queries.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


class Watch(L.Callback):
    """Records the loss of every step, the first gradients, and all parameters before training."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.before: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.gradients:
            named = pl_module.named_parameters()
            self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def data_of(
    folder: str, records: str, candidates: CandidateSettings | None = None
) -> PerturbedQueryDataModule:
    """A data module with all records in one batch, noised at the resolution of the model."""
    source = JsonlSource(records)
    return PerturbedQueryDataModule(
        folder, train=source, noise=NOISE, candidates=candidates, batch_size=len(SIZES), workers=0
    )


def fit(
    module: L.LightningModule, data: PerturbedQueryDataModule, steps: int, precision: str = "32-true"
) -> Watch:
    """Train for a number of steps."""
    watch = Watch()
    plain_trainer(Path(), watch, max_steps=steps, precision=precision).fit(module, datamodule=data)
    return watch


@dataclass
class Run:
    """A family's run through both stages.

    Attributes:
        family: the model family.
        base: the base model.
        records: path of the records.
        data: the data of stage 2.
        sft, dpo: the modules of the stages, after training.
        watched: stage -> its recorded training.
        adapters: stage -> folder of its adapter.
    """

    family: Family
    base: BaseModel
    records: str
    data: PerturbedQueryDataModule
    sft: SFTModule
    dpo: DPOModule
    watched: dict[str, Watch]
    adapters: dict[str, str]

    @property
    def tolerance(self) -> float:
        """Tolerance between log-likelihoods that are computed in two ways.

        Which features LLM.int8() treats as outliers depends on the rest of the batch.
        """
        return 0.05 if self.base.quantization == "int8" else 1e-4

    def batch(self, kind: Literal["sft", "candidates", "prompts"]) -> Any:
        """The records, collated for SFT, preference optimisation or generation."""
        collators = {
            "sft": SFTCollator(self.data.chat, self.data.max_length),
            "candidates": self.data.candidate_collator,
            "prompts": PromptCollator(self.data.chat),
        }
        dataset = self.data.train_dataloader().dataset
        return collators[kind]([dataset[0, i] for i in range(len(SIZES))])  # type: ignore[operator]


def run_through(family: Family, quantization: Quantization, records: str, folder: Path) -> Run:
    """Run SFT, then DPO from its adapter; save both adapters."""
    base = BaseModel(family.save(folder / "base"), dtype="float32", quantization=quantization)
    watched, adapters = {}, {stage: str(folder / stage) for stage in ("sft", "dpo")}
    torch.manual_seed(0)
    sft = SFTModule(base, LORA, OptimizerSettings(lr=2e-2, warmup_fraction=0.0))
    watched["sft"] = fit(sft, data_of(base.name_or_path, records), 28)
    sft.model.save_pretrained(adapters["sft"])
    data = data_of(base.name_or_path, records, CandidateSettings())
    dpo = DPOModule(
        base,
        adapters["sft"],
        pairs=PairPolicy(target="level"),
        optimizer=OptimizerSettings(lr=1e-3, warmup_fraction=0.0),
    )
    watched["dpo"] = fit(dpo, data, 2)
    dpo.model.save_pretrained(adapters["dpo"], selected_adapters=["default"])
    dpo.model.eval()
    return Run(family, base, records, data, sft, dpo, watched, adapters)
