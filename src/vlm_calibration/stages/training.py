"""What both training stages share: preparing the model, checkpoints of the trained weights, seeds, and logging."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.records import DataError
from vlm_calibration.stages.answering import shard_as_asked
from vlm_calibration.stages.scoring import Results

PROGRESS_BAR = ("accuracy", "ece")
"""Validation metrics in the progress bar."""


def prepare_for_training(module: L.LightningModule, model: Any, gradient_checkpointing: bool) -> Any:
    """Put a model with its adapter in train mode, and shard it if the strategy asks for it.

    from_pretrained leaves a model in eval mode and Lightning keeps that; checkpointing and dropout need train mode.
    """
    if gradient_checkpointing:
        base = unwrap_peft(model)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers makes inputs require gradients, which only reentrant checkpointing needs: the frozen tower would be
        # recomputed in the backward pass.
        base.disable_input_require_grads()
    return shard_as_asked(module, model).train()


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def keep_trained_weights(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Drop the frozen weights from a checkpoint; they are loaded from the base model."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


def check_trained_weights(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint holds exactly the trained weights of this module, before any of it is loaded.

    Raises:
        DataError: it belongs to another model or adapter.
    """
    expected = {name: list(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    saved = {name: list(weight.shape) for name, weight in checkpoint["state_dict"].items()}
    names = sorted(name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name))
    if names:
        there, here = (shapes.get(names[0], "missing") for shapes in (saved, expected))
        raise DataError(
            f"--ckpt_path: the checkpoint belongs to another model or adapter: {len(names)} trained weights differ, the "
            f"first is {names[0]}, there {there}, here {here}; use the settings of the run that wrote the checkpoint"
        )


def seed_batch(module: L.LightningModule, batch_idx: int) -> None:
    """Seed torch with (seed, epoch, batch, process), so that dropout is the same after a restart."""
    trainer = module.trainer
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    words = np.random.SeedSequence([seed, trainer.current_epoch, batch_idx, trainer.global_rank])
    torch.manual_seed(int(words.generate_state(1, np.uint64)[0]))


def zero_loss(module: nn.Module) -> Tensor:
    """The loss of a batch without samples: 0, with a gradient for every trained parameter to keep processes in step."""
    parameters = trained_parameters(module)
    shares = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return sum(p.sum() * 0.0 for p in shares)  # type: ignore[return-value]


def lend_batch(module: L.LightningModule, batch: Any) -> Any:
    """The batch to run: that of another process if this one has no samples and the weights are sharded, else `batch`.

    A pass gathers sharded weights from all processes, and a backward pass reduces their gradients. So a process without samples runs
    the batch of the first process that has any, with a loss of 0. Every process must call this.
    """
    if module.device_mesh is None or module.trainer.strategy.reduce_boolean_decision(bool(batch.inputs)):
        return batch
    filled: list[bool] = [False] * module.trainer.world_size
    dist.all_gather_object(filled, bool(batch.inputs))
    if not any(filled):
        return batch
    lender = filled.index(True)
    lent = module.trainer.strategy.broadcast(batch.to("cpu"), lender)
    return batch if batch.inputs else lent.to(module.device)


def log_results(module: L.LightningModule, results: Results) -> None:
    """Log the validation metrics of the run itself."""
    for name, value in results[""].items():
        module.log(f"val/{name}", value, prog_bar=name in PROGRESS_BAR, rank_zero_only=True)


def warn_of_skipped(module: L.LightningModule, skipped: int) -> None:
    """Warn with the number of samples that all processes skipped."""
    warn_of_total(module, skipped, "samples were longer than data.max_length and were skipped")


def warn_of_total(module: L.LightningModule, count: int, what: str) -> None:
    """Warn with the sum of a count over all processes, unless it is 0."""
    total = module.trainer.strategy.reduce(torch.tensor(float(count), device=module.device), reduce_op="sum")
    if total > 0:
        rank_zero_warn(f"{int(total)} {what}")
