"""Writes `predictions.jsonl` and `metrics.json` of every evaluated system into the run directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from vlm_calibration.benchmarks.files import OFFICIAL
from vlm_calibration.data.module import TESTED, PerturbedQueryDataModule
from vlm_calibration.estimators.predictions import CALIBRATION, PREDICTIONS, read_predictions
from vlm_calibration.estimators.teacher import TEACHER, taught_confidences
from vlm_calibration.files import clear_leftovers, json_number, remove, write_json
from vlm_calibration.metrics.functional import REPORTED, table_values
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.models.base import THRESHOLDS
from vlm_calibration.records import DataError
from vlm_calibration.reporting.runs import METRICS, NOTES
from vlm_calibration.stages.answer_log import VALIDATED, AnswerLog, ResumeState
from vlm_calibration.stages.evaluation import BatchAnswers, EvaluationModule

T = TypeVar("T")


def broadcast_from_first(trainer: L.Trainer, compute: Callable[[], T]) -> T:
    """The value that the first process computes, in all processes, or the DataError or OSError that it raises; every process must call this."""
    value: T | DataError | OSError | None = None
    if trainer.is_global_zero:
        try:
            value = compute()
        except (DataError, OSError) as error:
            value = error
    value = trainer.strategy.broadcast(value)
    if isinstance(value, DataError | OSError):
        raise value
    return value  # type: ignore[return-value]


TEST, HELD_OUT = TESTED
VALIDATION = "validation"
FILES = {TEST: PREDICTIONS, HELD_OUT: CALIBRATION, VALIDATION: PREDICTIONS}


class PredictionWriter(L.Callback):
    """Writes the predictions and metrics of validations and evaluations, and resumes an interrupted evaluation.

    The files of a system are in the folder of its name; the system "" is the run itself. Each process appends its answers to an
    `AnswerLog`, from which the first process writes them in the order of the data.
    """

    _log: AnswerLog
    start_over = False  # whether an evaluation asks all queries again, whatever an earlier one answered

    def outputs(self, folder: Path, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
        systems = module.systems if isinstance(module, EvaluationModule) else ()
        return [folder / system / METRICS for system in systems]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder, rank = Path(trainer.default_root_dir), trainer.global_rank
        data: PerturbedQueryDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self._complete, self._state = False, ResumeState()
        if stage != "test":
            queries = data.sets[VALIDATION].queries if VALIDATION in data.sets else ()
            self._log = AnswerLog(folder, rank, {VALIDATION: queries}, name=VALIDATED)
            if trainer.is_global_zero:
                # A validation that was killed may have left answers.
                self._log.clear()
            return
        log = self._log = AnswerLog(folder, rank, data.tested_queries, pl_module.run_digest)  # type: ignore[arg-type]
        if not self.start_over:
            self._state = broadcast_from_first(trainer, lambda: log.find(trainer.limit_test_batches))
        data.answered = self._state.answered or {}

    def on_test_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # The other processes wait, since this may remove their files.
        broadcast_from_first(trainer, lambda: self._begin(trainer, cast(EvaluationModule, module)))

    def _begin(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        if self._state.message:
            rank_zero_info(self._state.message)
        for folder in (self._log.folder, *(self._log.folder / system for system in module.systems)):
            clear_leftovers(folder)
        if self._state.answered is None:
            self._log.clear()
        if self.start_over:
            of_systems = (METRICS, NOTES, OFFICIAL, THRESHOLDS, *FILES.values())
            for pattern in ("report.*", *(f"*/{name}" for name in of_systems)):
                for path in self._log.folder.glob(pattern):
                    remove(path)
        for batch in self._log.batches(TEST) if self._state.answered is not None else ():
            module.count(batch)

    def on_validation_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self._log.add(VALIDATION, BatchAnswers(answers=outputs, passes={}))

    def on_test_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int, dataloader_idx: int = 0
    ) -> None:
        self._log.add(TESTED[dataloader_idx], outputs)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.on_validation_end(trainer, module)
        self._complete = True

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        log = self._log
        log.close()
        trainer.strategy.barrier("answers")
        if trainer.is_global_zero:
            for system, metrics in module.results.items():
                folder = log.folder / system
                if HELD_OUT not in log.queries and TEST in log.queries:
                    remove(folder / CALIBRATION)
                for split in log.queries:
                    total = int(metrics["n"]) if split == TEST else None
                    log.write_predictions(system, split, folder / FILES[split], total)
                if not trainer.sanity_checking:
                    if HELD_OUT in log.queries:
                        metrics = {**metrics, **teacher_metrics(folder)}
                    write_json(folder / METRICS, {k: json_number(k, v) for k, v in metrics.items()})
                    if notes := getattr(module, "notes", {}).get(system):
                        write_json(folder / NOTES, dict(notes))
                    else:
                        remove(folder / NOTES)
            if VALIDATION in log.queries:
                log.clear()
        trainer.strategy.barrier("predictions written")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._complete and trainer.is_global_zero:
            self._log.clear()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_log"):
            self._log.close()
            if VALIDATION in self._log.queries:
                self._log.path.unlink(missing_ok=True)


def teacher_metrics(folder: Path) -> dict[str, float]:
    """Metrics, as `METRIC@teacher`, of what a teacher that is fitted on a system's calibration answers makes of those to the test set."""
    predictions, calibration = (read_predictions(folder / FILES[split]) for split in TESTED)
    if not (confidences := taught_confidences(predictions, calibration)):
        return {}
    table = ConfidenceTable.from_predictions(confidences, [p.correct for p in predictions], None)
    return table_values(table, REPORTED[1:], f"@{TEACHER}")


def require_writer(trainer: L.Trainer, callback: L.Callback) -> None:
    """Raise a DataError unless a `PredictionWriter` stands before a callback that reads its files."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(c, PredictionWriter) for c in callbacks[: callbacks.index(callback)]):
        raise DataError(f"trainer.callbacks: {type(callback).__name__} needs a PredictionWriter before it")
