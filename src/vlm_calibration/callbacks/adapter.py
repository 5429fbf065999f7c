"""Writes the trained adapter as plain PEFT, with the processor beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L

from vlm_calibration.callbacks.files import replacing


class AdapterWriter(L.Callback):
    """`adapter/` in the run directory, written when training ends, loadable with peft alone."""

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.interrupted:
            with replacing(Path(trainer.default_root_dir) / "adapter") as temporary:
                # A preference stage holds its frozen reference beside what it trains.
                cast(Any, module).model.save_pretrained(temporary, selected_adapters=["default"])
                trainer.datamodule.processor.save_pretrained(temporary)  # type: ignore[attr-defined]
        trainer.strategy.barrier("adapter")
