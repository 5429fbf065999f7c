"""Figures and tables of a validation or an evaluation in W&B: reliability, response to perturbation, risk and coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from vlm_calibration.callbacks.distributed import all_gather
from vlm_calibration.callbacks.logger import staged, wandb_logger
from vlm_calibration.callbacks.media import data_table, drawing
from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.callbacks.samples import SampleTable
from vlm_calibration.data.dataset import PerturbedQueries
from vlm_calibration.metrics.figures import (
    ResponseTables,
    reliability_diagram,
    response_curve,
    risk_coverage_figure,
)
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.table import ConfidenceTable, tables_by_category
from vlm_calibration.records import Prediction
from vlm_calibration.reporting.tables import COLUMNS
from vlm_calibration.stages.scoring import HasResults

Answers = Mapping[str, Sequence[Prediction]]

UNPERTURBED = ("unperturbed", 0.0)
"""Key of the answers in splits that are not perturbed, which are not those of a response curve."""


def tables_by_perturbation(predictions: Sequence[Prediction], dataset: PerturbedQueries) -> ResponseTables:
    """Count predictions by kind and strength of perturbation; those to splits that are not perturbed under `UNPERTURBED`."""
    return tables_by_category(
        [p.confidence for p in predictions],
        [p.correct for p in predictions],
        [
            (p.perturbation or "", p.strength or 0.0) if dataset.is_noised(p.id) else UNPERTURBED
            for p in predictions
        ],
    )


def add_tables(total: ResponseTables, tables: ResponseTables) -> None:
    """Add tables to `total`, in place."""
    for key, table in tables.items():
        total[key] = total[key] + table if key in total else table


class CalibrationFigures(L.Callback):
    """Log figures and tables to W&B after every validation and evaluation.

    For each system:

    - `reliability`, `risk_coverage` and, if images were perturbed, `response_curve`: figures.
    - `confidence_table` and `response_table`: the numbers behind them.

    Once for all systems:

    - `samples`: answers to the same queries each time, with the image that the model was given.
    - `comparison`, in an evaluation: metrics, a row a system.

    Names begin with `val/`, or with `test/` and the system's name. Without a W&B logger nothing is drawn.

    Args:
        samples: number of queries in `samples`.
    """

    def __init__(self, samples: int = 16) -> None:
        self.samples = samples
        self._tables: dict[str, ResponseTables] = {}
        self._samples: SampleTable | None = None

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin(trainer, trainer.val_dataloaders.dataset, taught=True)  # type: ignore[union-attr]

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin(trainer, trainer.datamodule.test_set, taught=False)  # type: ignore[attr-defined]
        for writer in trainer.callbacks if self._samples else ():  # type: ignore[attr-defined]
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
        # All processes have the same loggers, so all of them return here or none.
        self._samples = None
        if trainer.sanity_checking or not any(isinstance(log, WandbLogger) for log in trainer.loggers):
            return
        self._tables = {}
        self._samples = SampleTable(dataset, self.samples, trainer.world_size, taught)

    def _update(self, answers: Answers) -> None:
        if self._samples is None:
            return
        for system, predictions in answers.items():
            tables = tables_by_perturbation(predictions, self._samples.dataset)
            add_tables(self._tables.setdefault(system, {}), tables)
            self._samples.update(system, predictions)

    def _finish(self, trainer: L.Trainer, stage: str, more: Mapping[str, Any] | None = None) -> None:
        if self._samples is None:
            return
        totals: dict[str, ResponseTables] = {}
        for of_process in all_gather(trainer, self._tables):
            for system, tables in of_process.items():
                add_tables(totals.setdefault(system, {}), tables)
        logger = wandb_logger(trainer)
        if logger is None:
            return
        with staged(logger):
            media = dict(more or {})
            for system, tables in totals.items():
                prefix = f"{stage}/{system}" if system else stage
                media.update((f"{prefix}/{name}", value) for name, value in media_of(tables).items())
            if self._samples.answers:
                media[f"{stage}/samples"] = self._samples.draw()
            # Lightning counts the steps of metrics from 0.
            logger.log_metrics(media, step=max(trainer.global_step - 1, 0))


def media_of(tables: ResponseTables) -> dict[str, Any]:
    """The figures and tables of one system, by name."""
    total = sum(tables.values(), start=ConfidenceTable.empty())
    perturbed = {key: table for key, table in tables.items() if key != UNPERTURBED}
    media: dict[str, Any] = {
        "reliability": drawing(reliability_diagram(total)),
        "risk_coverage": drawing(risk_coverage_figure(total)),
        "confidence_table": confidence_table(total),
    }
    if perturbed:
        media["response_curve"] = drawing(response_curve(perturbed))
        media["response_table"] = response_table(perturbed)
    return media


def confidence_table(table: ConfidenceTable) -> Any:
    """Correct and wrong answers at each stated confidence in [0, 1]."""
    rows = [
        [level / table.grid_steps, correct, wrong]
        for level, (wrong, correct) in enumerate(table.counts.tolist())
        if correct or wrong
    ]
    return data_table(["confidence", "right", "wrong"], rows)


def response_table(tables: ResponseTables) -> Any:
    """Number of answers with a readable confidence at each strength of each kind, their accuracy and mean confidence."""
    rows = [
        [
            kind or "untouched",
            strength,
            table.parsed,
            *(float(METRICS[name](table)) for name in ("parsed_accuracy", "mean_confidence")),
        ]
        for (kind, strength), table in sorted(tables.items())
        if table.parsed
    ]
    return data_table(["kind", "strength", "answers", "accuracy", "mean_confidence"], rows)


def comparison_table(results: Mapping[str, Mapping[str, float]]) -> Any:
    """The overall metrics, a row a system; None where undefined."""
    names = ["n", *COLUMNS]
    rows = [
        [system, *(None if values[name] != values[name] else values[name] for name in names)]
        for system, values in results.items()
    ]
    return data_table(["system", *names], rows)
