"""Writes `predictions.jsonl` and `metrics.json` of every evaluated system into the run directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from vlm_calibration.callbacks.distributed import broadcast_from_first
from vlm_calibration.callbacks.fingerprint import fingerprint
from vlm_calibration.callbacks.progress import Answered, Progress, ResumeState
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.estimators.predictions import CALIBRATION, PREDICTIONS
from vlm_calibration.files import append, json_number, replacing, write_json, writing
from vlm_calibration.records import Prediction
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.scoring import HasResults, Results

PART = ".predictions.{}.jsonl"


class PredictionWriter(L.Callback):
    """Predictions and metrics of validation and test.

    A system named "" is the run itself; others get a folder of their name in it. Each process writes what it answered
    to a file of its own, so that memory does not grow; the first process then brings them into the order that a single
    process would have written. In a test those files stay where the run ends early, and the next run with the same
    settings and data in this run directory goes on from there.
    """

    def __init__(self) -> None:
        self._open: dict[str, FileIO] = {}
        self._progress: Progress | None = None
        self._decisive: dict[str, str] = {}
        self._before = ResumeState(False, [], "")
        self._done = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Clear away the parts of a validation that was killed here; find out what a test that was has answered."""
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            for part in [*folder.glob(PART.format("*")), *folder.glob(f"*/{PART.format('*')}")]:
                part.unlink(missing_ok=True)
        self._progress, self._done = None, False
        if stage == "test":
            self._progress = Progress(folder, trainer.global_rank)
            self._before = broadcast_from_first(
                trainer, lambda: self._find(trainer, cast(EvaluationModule, pl_module))
            )
            _data(trainer).leave_out_answered(self._before.places)

    def _find(self, trainer: L.Trainer, module: EvaluationModule) -> ResumeState:
        assert self._progress is not None
        data = _data(trainer)
        self._decisive = fingerprint(trainer, module, data)
        total = len(data.test_set) + len(data.calibration_set or ())
        return self._progress.find(self._decisive, total, whole=_asks_all(trainer))

    def answered_before(self, trainer: L.Trainer) -> Iterator[Answered]:
        """The batches of the test set that an earlier run answered, in the first process; none in others."""
        end = len(_data(trainer).test_set)
        before = iter(()) if self._progress is None else self._progress.before()
        return (answered for answered in before if all(place < end for place in answered.places))

    def on_test_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin, or go on, now that the model is loaded and nothing stands against it."""
        # The other processes wait: their files may be cleared away.
        broadcast_from_first(trainer, lambda: self._begin(trainer, cast(EvaluationModule, module)))

    def _begin(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        assert self._progress is not None
        if self._before.message:
            rank_zero_info(self._before.message)
        self._progress.clear_leftovers(module.systems)
        self._progress.begin(self._decisive, anew=not self._before.goes_on)
        for answered in self.answered_before(trainer):
            module.count(answered.answers, answered.passes)

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._write(trainer, outputs)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._progress is not None
        if places := _data(trainer).asked(batch_idx, dataloader_idx):
            self._progress.append(Answered(places, outputs, cast(EvaluationModule, module).passes))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._finish(trainer, cast(HasResults, module).results)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert self._progress is not None
        self._progress.close()
        trainer.strategy.barrier("answers")
        if trainer.is_global_zero:
            self._write_answers(trainer, cast(HasResults, module).results)
        trainer.strategy.barrier("predictions written")
        self._done = True

    def _write_answers(self, trainer: L.Trainer, results: Results) -> None:
        """Write all files of a test; a calibration set that an earlier one had here goes."""
        assert self._progress is not None
        end, calibration = len(_data(trainer).test_set), _data(trainer).calibration_set
        for system, metrics in results.items():
            folder = system_folder(trainer, system)
            self._progress.write_predictions(system, folder / PREDICTIONS, range(end), int(metrics["n"]))
            if calibration is None:
                (folder / CALIBRATION).unlink(missing_ok=True)
            else:
                places = range(end, end + len(calibration))
                self._progress.write_predictions(system, folder / CALIBRATION, places, None)
            _write_metrics(folder, metrics)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The end of a run that was not interrupted: the files are written, and nobody has to go on."""
        if self._progress is not None and self._done and trainer.is_global_zero:
            self._progress.clear()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if self._progress is not None:
            self._progress.close()
        for system, file in self._open.items():
            file.close()
            _part(trainer, system, trainer.global_rank).unlink(missing_ok=True)
        self._open.clear()

    def _write(self, trainer: L.Trainer, outputs: dict[str, list[Prediction]]) -> None:
        for system, predictions in outputs.items():
            part = _part(trainer, system, trainer.global_rank)
            lines = [
                json.dumps(prediction.to_dict(), ensure_ascii=False) + "\n" for prediction in predictions
            ]
            with writing(part):
                if system not in self._open:
                    part.parent.mkdir(parents=True, exist_ok=True)
                    self._open[system] = part.open("wb", buffering=0)
                append(self._open[system], "".join(lines).encode())

    def _finish(self, trainer: L.Trainer, results: Results) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            places = {query.id: place for place, query in enumerate(_data(trainer).validation_set.queries)}
            for system, metrics in results.items():
                folder = system_folder(trainer, system)
                parts = [_part(trainer, system, rank) for rank in range(trainer.world_size)]
                with replacing(folder / PREDICTIONS) as temporary:
                    _merge([p for p in parts if p.exists()], places, temporary)
                for part in parts:
                    part.unlink(missing_ok=True)
                if not trainer.sanity_checking:
                    _write_metrics(folder, metrics)
        trainer.strategy.barrier("predictions written")


def _write_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    write_json(folder / "metrics.json", {k: json_number(k, v) for k, v in metrics.items()})


def _asks_all(trainer: L.Trainer) -> bool:
    return isinstance(trainer.limit_test_batches, float) and trainer.limit_test_batches == 1


def _data(trainer: L.Trainer) -> PerturbedQueryDataModule:
    return trainer.datamodule  # type: ignore[attr-defined]


def system_folder(trainer: L.Trainer, system: str) -> Path:
    return Path(trainer.default_root_dir) / system


def _part(trainer: L.Trainer, system: str, rank: int) -> Path:
    return system_folder(trainer, system) / PART.format(rank)


def _merge(parts: Sequence[Path], places: Mapping[str, int], out: Path) -> None:
    """Write the lines of all parts in the order of the data: places of queries by id."""
    lines: list[str] = []
    for part in parts:
        with part.open(encoding="utf-8") as file:
            lines += file
    lines.sort(key=lambda line: places[json.loads(line)["id"]])
    with out.open("w", encoding="utf-8") as merged:
        merged.writelines(lines)
