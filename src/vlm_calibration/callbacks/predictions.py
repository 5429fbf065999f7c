"""Writes `predictions.jsonl` and `metrics.json` of every evaluated system into the run directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO, cast

import lightning as L

from vlm_calibration.callbacks.files import json_number, replacing, write_json
from vlm_calibration.records import Prediction
from vlm_calibration.stages.scoring import HasResults, Results

PART = ".predictions.{}.jsonl"


class PredictionWriter(L.Callback):
    """Predictions and metrics of validation and test.

    A system named "" is the run itself; others get a folder of their name in it. Each process writes what it answered
    to a part file, so that memory does not grow; the first process then weaves the parts into the order that a single
    process would have written.
    """

    def __init__(self) -> None:
        self._open: dict[str, TextIO] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Clear away the parts of a run that was killed here."""
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            for part in [*folder.glob(PART.format("*")), *folder.glob(f"*/{PART.format('*')}")]:
                part.unlink(missing_ok=True)

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._write(trainer, outputs)

    def on_test_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self._write(trainer, outputs)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._finish(trainer, cast(HasResults, module).results)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._finish(trainer, cast(HasResults, module).results)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        for system, file in self._open.items():
            file.close()
            _part(trainer, system, trainer.global_rank).unlink(missing_ok=True)
        self._open.clear()

    def _write(self, trainer: L.Trainer, outputs: dict[str, list[Prediction]]) -> None:
        for system, predictions in outputs.items():
            if system not in self._open:
                part = _part(trainer, system, trainer.global_rank)
                part.parent.mkdir(parents=True, exist_ok=True)
                self._open[system] = part.open("w", encoding="utf-8")
            for prediction in predictions:
                self._open[system].write(json.dumps(prediction.to_dict(), ensure_ascii=False) + "\n")

    def _finish(self, trainer: L.Trainer, results: Results) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            for system, metrics in results.items():
                folder = system_folder(trainer, system)
                parts = [_part(trainer, system, rank) for rank in range(trainer.world_size)]
                with replacing(folder / "predictions.jsonl") as temporary:
                    _weave([p for p in parts if p.exists()], temporary)
                for part in parts:
                    part.unlink(missing_ok=True)
                if not trainer.sanity_checking:
                    write_json(folder / "metrics.json", {k: json_number(k, v) for k, v in metrics.items()})
        trainer.strategy.barrier("predictions written")


def system_folder(trainer: L.Trainer, system: str) -> Path:
    return Path(trainer.default_root_dir) / system


def _part(trainer: L.Trainer, system: str, rank: int) -> Path:
    return system_folder(trainer, system) / PART.format(rank)


def _weave(parts: Sequence[Path], out: Path) -> None:
    """Line 1 of every part, then line 2 of every part, and so on: the order of the data."""
    files = [p.open(encoding="utf-8") for p in parts]
    try:
        with out.open("w", encoding="utf-8") as merged:
            merged.writelines(_in_turn(files))
    finally:
        for file in files:
            file.close()


def _in_turn(files: Sequence[TextIO]) -> Iterator[str]:
    for lines in zip_longest(*files):
        yield from (line for line in lines if line is not None)
