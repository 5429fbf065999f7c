"""What a validation or an evaluation found, as figures and tables in W&B: reliability, response to noise, risk and coverage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from vlm_calibration.callbacks.distributed import all_gather
from vlm_calibration.callbacks.logger import staged, wandb_logger
from vlm_calibration.callbacks.media import data_table, drawing
from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.callbacks.samples import SampleTable
from vlm_calibration.data.dataset import PerturbedQueries
from vlm_calibration.metrics.figures import reliability_diagram, response_curve, risk_coverage_figure
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.metrics.table_metrics import METRICS
from vlm_calibration.records import Prediction
from vlm_calibration.reporting.tables import COLUMNS
from vlm_calibration.stages.scoring import HasResults

Answers = Mapping[str, Sequence[Prediction]]


@dataclass
class ConfidenceCounts:
    """Answers of one system: all of them, and those to queries that were noised, by the step of the noise."""

    table: ConfidenceTable = field(default_factory=ConfidenceTable.empty)
    steps: dict[int, ConfidenceTable] = field(default_factory=dict)

    def update(self, predictions: Iterable[Prediction], dataset: PerturbedQueries) -> None:
        by_step: dict[int | None, list[Prediction]] = {}
        for prediction in predictions:
            step = prediction.noise_step if dataset.is_noised(prediction.id) else None
            by_step.setdefault(step, []).append(prediction)
        for step, found in by_step.items():
            table = ConfidenceTable.from_predictions(
                [p.confidence for p in found], [p.correct for p in found]
            )
            self.add(ConfidenceCounts(table, {} if step is None else {step: table}))

    def add(self, other: ConfidenceCounts) -> None:
        self.table = self.table + other.table
        for step, table in other.steps.items():
            self.steps[step] = self.steps[step] + table if step in self.steps else table


class CalibrationFigures(L.Callback):
    """Logs to W&B, after every validation and evaluation, for each system that answered:

    - `reliability`, `risk_coverage` and, where images were noised, `response_curve`: figures.
    - `confidence_table` and `response_table`: the numbers behind them.

    and once for all systems:

    - `samples`: answers to the same queries each time, with the image as the model saw it.
    - `comparison`, in an evaluation: metrics, a row a system.

    Their names begin with `val/`, or `test/` and the system's name. Without a W&B logger nothing is drawn.

    Args:
        samples: how many queries `samples` holds.
    """

    def __init__(self, samples: int = 16) -> None:
        self.samples = samples
        self._counts: dict[str, ConfidenceCounts] = {}
        self._table: SampleTable | None = None

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin(trainer, trainer.val_dataloaders.dataset, taught=True)  # type: ignore[union-attr]

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin(trainer, trainer.datamodule.test_set, taught=False)  # type: ignore[attr-defined]
        for writer in trainer.callbacks if self._table else ():  # type: ignore[attr-defined]
            if isinstance(writer, PredictionWriter):
                for batch in writer.earlier_answers(trainer):
                    self._update(batch["answers"])

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._update(outputs)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == 0:  # the second loader has the calibration set
            self._update(outputs["answers"])

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._finish(trainer, "val")

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        results = cast(HasResults, module).results
        self._finish(trainer, "test", {"test/comparison": comparison_table(results)})

    def _begin(self, trainer: L.Trainer, dataset: PerturbedQueries, *, taught: bool) -> None:
        # The loggers are the same in all processes, which go on together.
        self._table = None
        if trainer.sanity_checking or not any(isinstance(log, WandbLogger) for log in trainer.loggers):
            return
        self._counts = {}
        self._table = SampleTable(dataset, self.samples, trainer.world_size, taught)

    def _update(self, answers: Answers) -> None:
        if self._table is None:
            return
        for system, predictions in answers.items():
            self._counts.setdefault(system, ConfidenceCounts()).update(predictions, self._table.dataset)
            self._table.update(system, predictions)

    def _finish(self, trainer: L.Trainer, stage: str, more: Mapping[str, Any] | None = None) -> None:
        if self._table is None:
            return
        counts: dict[str, ConfidenceCounts] = {}
        for part in all_gather(trainer, self._counts):
            for system, found in part.items():
                counts.setdefault(system, ConfidenceCounts()).add(found)
        logger = wandb_logger(trainer)
        if logger is None:
            return
        with staged(logger):
            media = dict(more or {})
            for system, found in counts.items():
                prefix = f"{stage}/{system}" if system else stage
                media.update((f"{prefix}/{name}", value) for name, value in media_of(found).items())
            if self._table.answers:
                media[f"{stage}/samples"] = self._table.draw()
            # Lightning counts the steps of metrics from 0.
            logger.log_metrics(media, step=max(trainer.global_step - 1, 0))


def media_of(counts: ConfidenceCounts) -> dict[str, Any]:
    """The figures and tables of one system, by name."""
    media: dict[str, Any] = {
        "reliability": drawing(reliability_diagram(counts.table)),
        "risk_coverage": drawing(risk_coverage_figure(counts.table)),
        "confidence_table": confidence_table(counts.table),
    }
    if counts.steps:
        media["response_curve"] = drawing(response_curve(counts.steps))
        media["response_table"] = response_table(counts.steps)
    return media


def confidence_table(table: ConfidenceTable) -> Any:
    """Right and wrong answers at each confidence in [0, 1] that was stated."""
    rows = [
        [level / table.resolution, int(right), int(wrong)]
        for level, (wrong, right) in enumerate(table.counts.tolist())
        if right or wrong
    ]
    return data_table(["confidence", "right", "wrong"], rows)


def response_table(tables: Mapping[int, ConfidenceTable]) -> Any:
    """Answers with a readable confidence at each noise step, their accuracy, and the mean confidence that they state."""
    rows = [
        [
            step,
            table.parsed,
            *(float(METRICS[name](table)) for name in ("parsed_accuracy", "mean_confidence")),
        ]
        for step, table in sorted(tables.items())
        if table.parsed
    ]
    return data_table(["noise_step", "answers", "accuracy", "mean_confidence"], rows)


def comparison_table(results: Mapping[str, Mapping[str, float]]) -> Any:
    """The overall metrics, a row a system; None where undefined."""
    names = ["n", *COLUMNS]
    rows = [
        [system, *(None if values[name] != values[name] else values[name] for name in names)]
        for system, values in results.items()
    ]
    return data_table(["system", *names], rows)
