"""The peers of `tests.performance.preference` and `gpu`: TRL's `DPOTrainer` and `SFTTrainer`, one training step at a time, and Liger's DPO loss.

Constructor, collator, `training_step` (forward, reference, loss and backward) and optimizer are TRL's. Only the loop around
them is ours, so that its steps can alternate with others in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
import trl.trainer.utils
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from vlm_calibration.losses.sequence import IGNORE
from vlm_calibration.models.adapters import using_adapter
from vlm_calibration.models.forward import unwrap_peft

Row = dict[str, Any]
"""An example for TRL: images, prompt, and either chosen and rejected or completion, all texts rendered."""

datasets.disable_progress_bars()


class TRLStep:
    """Training steps of TRL.

    Args:
        folder: model, processor and, in `adapter/`, the LoRA adapter to start from. TRL treats it as a new adapter, so that
            its reference is the model without it.
        rows: the data set; preferences if the rows have a rejected response.
        beta: of DPO, whose other settings are TRL's defaults.
        restricted: apply the output head at labelled positions only, as TRL does with Triton kernels; without
            them, as on a CPU, TRL applies the head at all positions.
        scratch: folder that the trainer may write to.
        model: the model of the folder as `load_for_training` returns it.
        bf16: mixed precision, by accelerate.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Row],
        batch: int,
        lr: float,
        beta: float,
        restricted: bool,
        checkpointing: bool,
        scratch: Path,
        model: Any,
        bf16: bool = False,
    ) -> None:
        self.restricted = restricted
        adapter = str(folder / "adapter")
        lora = LoraConfig.from_pretrained(adapter)
        lora.inference_mode = False
        settings = {
            "output_dir": str(scratch),
            "per_device_train_batch_size": batch,
            "learning_rate": lr,
            "weight_decay": 0.0,
            "max_steps": 1000,
            "max_length": None,
            "gradient_checkpointing": checkpointing,
            "use_cpu": model.device.type == "cpu",
            "bf16": bf16,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        arguments = {
            "model": model,
            "train_dataset": _dataset(rows[:1]),  # which tells the kind of its rows; steps get their own
            "processing_class": AutoProcessor.from_pretrained(folder),
            "peft_config": lora,
        }
        if "rejected" in rows[0]:
            trainer = DPOTrainer(args=DPOConfig(**settings, beta=beta), **arguments)
        else:
            trainer = SFTTrainer(args=SFTConfig(**settings, completion_only_loss=True), **arguments)
        set_peft_model_state_dict(trainer.model, load_peft_weights(adapter))
        # `Trainer.train` does this before its loop.
        trainer.model.train()
        if checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.current_gradient_accumulation_steps = 1
        self.prepared = trainer.accelerator.prepare_model(trainer.model)
        self.trainer = trainer
        self.optimizer = trainer.create_optimizer()
        self.trained = [p for p in trainer.model.parameters() if p.requires_grad]

    @property
    def model(self) -> Any:
        return self.trainer.model

    def __call__(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Run one training step; returns its loss, and the seconds of it that collating took."""
        batch, collated = self._collated(rows)
        with mock.patch.object(trl.trainer.utils, "_use_triton", self._use_triton()):
            loss = self.trainer.training_step(self.prepared, batch)
        self._update()
        return float(loss), collated

    def _collated(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor], float]:
        start = time.perf_counter()
        batch = self.trainer.data_collator([dict(row) for row in rows])
        return batch, time.perf_counter() - start

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _use_triton(self) -> Callable[[torch.device], bool]:
        # TRL calls this function to decide whether to restrict the head; its kernels call another, which still returns False.
        return (lambda device: True) if self.restricted else trl.trainer.utils._use_triton


class LigerStep(TRLStep):
    """DPO steps with TRL's trainer and collator, and Liger's fused loss in place of TRL's; arguments as for `TRLStep`.

    `LigerFusedLinearDPOLoss` takes hidden states and applies output head, log-likelihoods and loss in chunks. It is written in PyTorch, so it
    runs on a CPU, where it is not compiled. Liger's SFT loss is a Triton kernel, which needs a GPU.

    Raises:
        ImportError: liger-kernel is not installed.
    """

    def __init__(self, *arguments: Any, beta: float, bf16: bool = False, **settings: Any) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        super().__init__(*arguments, beta=beta, bf16=bf16, **settings)
        self.device = self.model.device
        self.dtype = torch.bfloat16 if bf16 else None
        self.fused = LigerFusedLinearDPOLoss(beta=beta, compiled=self.device.type != "cpu")

    def __call__(self, rows: Sequence[Row]) -> tuple[float, float]:
        batch, collated = self._collated(rows)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, IGNORE)[:, 1:]
        with torch.autocast(self.device.type, dtype=self.dtype) if self.dtype else nullcontext():
            with torch.no_grad(), using_adapter(self.model, None):
                reference = self._hidden(batch)
            head = self.model.get_output_embeddings().weight
            loss, *_ = self.fused(head, self._hidden(batch), labels, ref_input=reference, ref_weight=head)
        loss.backward()
        self._update()
        return float(loss.detach()), collated

    def _hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Hidden states before the output head at all positions but the last, [rows, L - 1, D]."""
        base = unwrap_peft(self.model)
        hidden = base.base_model(**batch, use_cache=False).last_hidden_state[:, :-1]
        return hidden.to(base.get_output_embeddings().weight.dtype)


def _dataset(rows: Sequence[Row]) -> datasets.Dataset:
    texts = {name: datasets.Value("string") for name in rows[0] if name != "images"}
    features = datasets.Features({**texts, "images": datasets.List(datasets.Image())})
    return datasets.Dataset.from_list(list(rows), features=features)


def as_row(image: Any, **texts: str) -> Row:
    """One example of an image, uint8 [H, W, 3], and texts."""
    return {"images": [Image.fromarray(image)], **texts}
