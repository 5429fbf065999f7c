"""What the stages share: device and strategy, optimizer with learning rate schedule, and the base class of both training stages."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes as bnb
import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from vlm_calibration.data.candidates import ValidationBatch
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.models.forward import shard, unwrap_peft
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.stages.scoring import Results, Scorer

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": bnb.optim.AdamW8bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
}


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101) and its schedule.

    Args:
        name: "adamw", or with 8-bit states through bitsandbytes (arXiv 2110.02861): "adamw_8bit", and
            "paged_adamw_8bit", which moves states out of GPU memory when it runs short. Tensors of fewer than 4,096
            elements keep float32 states.
        lr: highest learning rate.
        weight_decay: decoupled weight decay.
        betas: decay rates of the first and second moments.
        eps: term added to the denominator for numerical stability.
        warmup_fraction: share of all steps, in [0, 1), in which the rate rises linearly.
        final_fraction: final learning rate as a share of `lr`, in [0, 1].
    """

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_fraction: float = 0.05
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        for name, is_valid, rule in (
            ("lr", 0 < self.lr < math.inf, "a finite number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
            ("warmup_fraction", 0 <= self.warmup_fraction < 1, "in [0, 1)"),
            ("final_fraction", 0 <= self.final_fraction <= 1, "in [0, 1]"),
        ):
            if not is_valid:
                raise DataError(f"optimizer.{name} must be {rule}, found {getattr(self, name)}")


def learning_rate_factor(step: int, total: int, settings: OptimizerSettings) -> float:
    """Learning rate of optimiser step `step` (from 0) of `total`, as a share of `lr`."""
    warmup = round(settings.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.final_fraction + (1.0 - settings.final_fraction) * cosine


def adamw_with_schedule(
    parameters: Iterable[nn.Parameter], settings: OptimizerSettings, total_steps: float
) -> dict[str, Any]:
    """The optimizer and its schedule, for `configure_optimizers`; raises a DataError if the number of steps is not finite."""
    if not 0 < total_steps < math.inf:
        raise DataError("the learning rate needs an end: set trainer.max_epochs or trainer.max_steps")
    optimizer = OPTIMIZERS[settings.name](
        parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, int(total_steps), settings)
    )
    # `name` is the key that the rate is logged under.
    scheduled = {"scheduler": schedule, "interval": "step", "name": "train/learning_rate"}
    return {"optimizer": optimizer, "lr_scheduler": scheduled}


def gather(rows: list[Any]) -> list[Any]:
    """The rows of all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]


def device_of(module: L.LightningModule) -> torch.device:
    """The device that the trainer runs a module on; the module's own without a trainer."""
    # A quantised model is loaded onto its device before Lightning moves anything there.
    attached = module._trainer is not None
    return module.trainer.strategy.root_device if attached else module.device


def refuse_sharding(module: L.LightningModule) -> None:
    """Raise a DataError if the trainer's strategy shards the weights, with which no answer can be generated."""
    if module.device_mesh is not None:
        raise DataError(
            "trainer.strategy: FSDP2 (ModelParallelStrategy) does not generate answers: use one device, trainer/ddp or model.endpoints"
        )


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


class TrainingStage(L.LightningModule, ABC):
    """Base class of both training stages, with the arguments that they share.

    Attributes:
        skipped: number of samples that were too long, in this process.
    """

    model: Any
    results: Results

    def __init__(
        self, base: BaseModel, optimizer: OptimizerSettings, gradient_checkpointing: bool, max_new_tokens: int
    ) -> None:
        super().__init__()
        self.base = base
        self.optimizer_settings = optimizer
        self.gradient_checkpointing = gradient_checkpointing
        self.max_new_tokens = max_new_tokens
        self.scorer = Scorer()
        self.skipped = 0
        # Checkpoints hold the trained weights alone; the frozen ones are loaded again.
        self.strict_loading = False

    def check_weights(self, *names: str) -> None:
        """Reject weights of the loss, by the names of their settings, that are not finite numbers of at least 0."""
        for name in names:
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise DataError(f"model.{name} must be a finite number of at least 0, found {value}")

    @property
    def data(self) -> PerturbedQueryDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @abstractmethod
    def check_data(self, data: PerturbedQueryDataModule) -> None:
        """Reject data that this stage cannot be trained on, before the model is loaded."""

    @abstractmethod
    def load_adapted(self) -> Any:
        """The base model with the adapter to train."""

    def setup(self, stage: str) -> None:
        if self.device_mesh is not None:
            if stage != "fit":
                refuse_sharding(self)
            if self.trainer.limit_val_batches != 0:
                raise DataError(
                    "trainer.limit_val_batches: FSDP2 (ModelParallelStrategy) does not validate: set it to 0, as trainer/fsdp2 does"
                )
            if self.base.quantization == "int8":
                # Their scales are lost with the class of their parameters.
                raise DataError(
                    "model.init_args.base.quantization: FSDP2 (ModelParallelStrategy) cannot shard int8 weights: use `nf4` or `none`"
                )
            rank_zero_info(
                "FSDP2 does not validate: evaluate the adapter with `vlm-calibration test` on one device, under DDP, or behind an address"
            )
        self.check_data(self.data)

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        model = self.load_adapted()
        if self.gradient_checkpointing:
            base = unwrap_peft(model)
            base.gradient_checkpointing_enable({"use_reentrant": False})
            # transformers makes inputs require gradients, which only reentrant checkpointing needs: the frozen tower would be
            # recomputed in the backward pass.
            base.disable_input_require_grads()
        if self.device_mesh is not None:
            shard(model, self.device_mesh["data_parallel"])
        # from_pretrained leaves a model in eval mode and Lightning keeps that; checkpointing and dropout need train mode.
        self.model = model.train()

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(
            trained_parameters(self), self.optimizer_settings, self.trainer.estimated_stepping_batches
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch with (seed, epoch, batch, process), so that dropout is the same after a restart."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        entropy = [seed, self.trainer.current_epoch, batch_idx, self.trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))

    def has_samples(self, batch: Any) -> bool:
        """Whether this process has samples in a batch; every process must call this, and with sharded weights needs some."""
        filled = bool(batch.inputs)
        if self.device_mesh is not None and not self.trainer.strategy.reduce_boolean_decision(filled):
            raise DataError(
                "FSDP2 needs a sample of each process in every batch: raise data.batch_size or data.max_length, or use trainer/ddp"
            )
        return filled

    def zero_loss(self) -> Tensor:
        """The loss of a batch without samples: 0, with a gradient for every trained parameter to keep processes in step."""
        return sum(p.sum() * 0.0 for p in trained_parameters(self))  # type: ignore[return-value]

    def on_validation_start(self) -> None:
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> dict[str, list[Prediction]]:
        answered = AnsweredBatch.generate(
            self.model, batch.prompts, AnswerTokenizer(self.data.chat), self.max_new_tokens, keep_cache=False
        )
        self.scorer.update(answered.predictions)
        return {"": list(answered.predictions)}

    def on_validation_epoch_end(self) -> None:
        self.results = {"": self.scorer.compute()}
        for name, value in self.results[""].items():
            self.log(f"val/{name}", value, prog_bar=name in ("accuracy", "ece"), rank_zero_only=True)

    def on_train_end(self) -> None:
        self.warn_of_total(self.skipped, "samples were longer than data.max_length and were skipped")

    def warn_of_total(self, count: int, what: str) -> None:
        """Warn with the sum of a count over all processes, unless it is 0."""
        total = self.trainer.strategy.reduce(torch.tensor(float(count), device=self.device), reduce_op="sum")
        if total > 0:
            rank_zero_warn(f"{int(total)} {what}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the frozen weights."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise a DataError unless a checkpoint holds exactly the trained weights of this module."""
        expected = {name: [*p.shape] for name, p in self.named_parameters() if p.requires_grad}
        saved = {name: [*weight.shape] for name, weight in checkpoint["state_dict"].items()}
        if names := sorted(n for n in expected.keys() | saved if expected.get(n) != saved.get(n)):
            there, here = (shapes.get(names[0], "missing") for shapes in (saved, expected))
            raise DataError(
                f"--ckpt_path: the checkpoint belongs to another model or adapter: {len(names)} trained weights differ, the "
                f"first is {names[0]}, there {there}, here {here}; use the settings of the run that wrote the checkpoint"
            )
