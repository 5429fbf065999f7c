"""Liger's fused DPO loss as a side of `tests.performance.gpu`: TRL's trainer and collator, with Liger's loss in place of TRL's.

`LigerFusedLinearDPOLoss` takes hidden states and applies output head, log-likelihoods and loss in chunks. It is written in PyTorch, so it runs
on a CPU, where it is not compiled. Liger's SFT loss is a Triton kernel, which needs a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from tests.performance.trl_peer import Row, TRLStep
from torch import Tensor

from vlm_calibration.losses.sequence import IGNORE
from vlm_calibration.models.adapters import using_adapter
from vlm_calibration.models.forward import unwrap_peft


class LigerStep(TRLStep):
    """DPO steps with Liger's loss; arguments as for `TRLStep`.

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
        start = time.perf_counter()
        batch = self.trainer.data_collator([dict(row) for row in rows])
        batch = {name: value.to(self.device) for name, value in batch.items()}
        collated = time.perf_counter() - start
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, IGNORE)[:, 1:]
        with torch.autocast(self.device.type, dtype=self.dtype) if self.dtype else nullcontext():
            with torch.no_grad(), using_adapter(self.model, None):
                reference = self._hidden(batch)
            head = self.model.get_output_embeddings().weight
            loss, *_ = self.fused(head, self._hidden(batch), labels, ref_input=reference, ref_weight=head)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), collated

    def _hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Hidden states before the output head at all positions but the last, [rows, L - 1, D]."""
        base = unwrap_peft(self.model)
        hidden = base.base_model(**batch, use_cache=False).last_hidden_state[:, :-1]
        return hidden.to(base.get_output_embeddings().weight.dtype)
