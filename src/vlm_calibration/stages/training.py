"""What the stages share: device and strategy; and in training the model, checkpoints of the trained weights, seeds, and logging."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.sharding import shard
from vlm_calibration.records import DataError
from vlm_calibration.stages.scoring import Results

PROGRESS_BAR = ("accuracy", "ece")
"""Validation metrics in the progress bar."""
TOO_LONG = "samples were longer than data.max_length and were skipped"


def device_of(module: L.LightningModule) -> torch.device:
    """The device that the trainer runs a module on; the module's own without a trainer."""
    # A quantised model is loaded onto its device before Lightning moves anything there.
    attached = module._trainer is not None
    return module.trainer.strategy.root_device if attached else module.device


def tokenizer_of(module: L.LightningModule) -> Any:
    """The tokenizer of the data that the trainer runs a module on."""
    return module.trainer.datamodule.processor.tokenizer  # type: ignore[attr-defined]


def refuse_sharding(module: L.LightningModule) -> None:
    """Refuse to answer with sharded weights, before they are loaded.

    Raises:
        DataError: the trainer's strategy shards the weights.
    """
    if module.device_mesh is not None:
        raise DataError(
            "trainer.strategy: FSDP2 (ModelParallelStrategy) trains, but does not generate answers: use one device, trainer/ddp, or a "
            "model behind an address (model.endpoints of `test`)"
        )


def check_strategy(module: L.LightningModule, stage: str, quantization: str) -> None:
    """Check, before the model is loaded, that the trainer's strategy can do what is asked; say that FSDP2 does not validate.

    Args:
        module: the stage.
        stage: what Lightning's `setup` is given: "fit" or "validate".
        quantization: of the base model.

    Raises:
        DataError: the strategy shards the weights, and answers are to be generated, or the weights are int8.
    """
    if module.device_mesh is None:
        return
    if stage != "fit":
        refuse_sharding(module)
    if module.trainer.limit_val_batches != 0:
        raise DataError(
            "trainer.limit_val_batches: FSDP2 (ModelParallelStrategy) does not validate: set it to 0, as trainer/fsdp2 does"
        )
    if quantization == "int8":
        # Their scales are lost with the class of their parameters.
        raise DataError(
            "model.init_args.base.quantization: FSDP2 (ModelParallelStrategy) cannot shard int8 weights: use `nf4` or `none`, or "
            "another strategy"
        )
    rank_zero_info(
        "FSDP2 does not validate: evaluate the adapter with `vlm-calibration test` on one device, under DDP, or behind an address"
    )


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
    if module.device_mesh is not None:
        shard(model, module.device_mesh["data_parallel"])
    return model.train()


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
    return sum(p.sum() * 0.0 for p in trained_parameters(module))  # type: ignore[return-value]


def has_samples(module: L.LightningModule, batch: Any) -> bool:
    """Whether this process has samples in a batch. Every process must call this.

    Raises:
        DataError: the weights are sharded, and a process has no samples: a pass gathers the weights from all processes.
    """
    filled = bool(batch.inputs)
    if module.device_mesh is not None and not module.trainer.strategy.reduce_boolean_decision(filled):
        raise DataError(
            "FSDP2 needs a sample of each process in every batch, but all those of a process were left out: raise data.batch_size or "
            "data.max_length, remove the records, or use trainer/ddp"
        )
    return filled


def log_results(module: L.LightningModule, results: Results) -> None:
    """Log the validation metrics of the run itself."""
    for name, value in results[""].items():
        module.log(f"val/{name}", value, prog_bar=name in PROGRESS_BAR, rank_zero_only=True)


def warn_of_total(module: L.LightningModule, count: int, what: str) -> None:
    """Warn with the sum of a count over all processes, unless it is 0."""
    total = module.trainer.strategy.reduce(torch.tensor(float(count), device=module.device), reduce_op="sum")
    if total > 0:
        rank_zero_warn(f"{int(total)} {what}")
