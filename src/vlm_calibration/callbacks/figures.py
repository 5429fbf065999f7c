"""Figures and tables of a validation or an evaluation in W&B, drawn from the predictions that `PredictionWriter` has written."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from vlm_calibration.callbacks.logger import staged, wandb_logger
from vlm_calibration.callbacks.predictions import require_writer
from vlm_calibration.data.dataset import PerturbedQueries
from vlm_calibration.estimators.predictions import PREDICTIONS, read_predictions
from vlm_calibration.metrics.figures import reliability_diagram, response_curve, risk_coverage_figure
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.records import Prediction
from vlm_calibration.reporting.report.data import System
from vlm_calibration.reporting.report.table import plain_rows

ANSWER_COLUMNS = ("text", "confidence", "correct")


class CalibrationFigures(L.Callback):
    """Logs figures and tables to a W&B logger after every validation and evaluation. Place it after `PredictionWriter`.

    Names begin with `val/`, or with `test/` and the system's name. For each system: the figures `reliability`, `risk_coverage` and, if
    images were perturbed, `response_curve`, with their numbers in `confidence_table` and `response_table`. For all systems: the answers
    to the same 16 `samples` each time, with the image as the model saw it; in an evaluation `comparison`, a row of metrics for each.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_writer(trainer, self)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log(trainer, module, "validation", "val")

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._log(trainer, module, "test", "test")

    def _log(self, trainer: L.Trainer, module: Any, split: str, stage: str) -> None:
        if (logger := wandb_logger(trainer)) is None:
            return
        folder, dataset = Path(trainer.default_root_dir), trainer.datamodule.sets[split]  # type: ignore[attr-defined]
        answers = {system: read_predictions(folder / system / PREDICTIONS) for system in module.results}
        with staged(logger):
            media: dict[str, Any] = {}
            if stage == "test":
                rows = plain_rows([System(name, given, {}, folder, {}) for name, given in answers.items()])
                media["test/comparison"] = _table([*rows.columns], rows.to_numpy().tolist())
            for system, predictions in answers.items():
                prefix = f"{stage}/{system}" if system else stage
                media |= {f"{prefix}/{name}": value for name, value in media_of(predictions, dataset).items()}
            media[f"{stage}/samples"] = sample_table(dataset, answers, 16, taught=stage == "val")
            # Lightning counts the steps of metrics from 0.
            logger.log_metrics(media, step=max(trainer.global_step - 1, 0))


def media_of(predictions: Sequence[Prediction], dataset: PerturbedQueries) -> dict[str, Any]:
    """The figures and tables of one system, by name; those of the response are over the splits with perturbed images."""
    total = _counted(predictions)
    counts = zip(total.value.tolist(), *reversed(total.counts.T.tolist()), strict=True)
    media: dict[str, Any] = {
        "reliability": _drawing(reliability_diagram(total)),
        "risk_coverage": _drawing(risk_coverage_figure(total)),
        "confidence_table": _table(["confidence", "right", "wrong"], [*map(list, counts)]),
    }
    by_perturbation: dict[tuple[str, float], list[Prediction]] = {}
    for p in predictions:
        if dataset.is_noised(p.id):
            by_perturbation.setdefault((p.perturbation or "", p.strength or 0.0), []).append(p)
    if by_perturbation:
        tables = {key: _counted(answers) for key, answers in sorted(by_perturbation.items())}
        rows = []
        for (kind, strength), table in tables.items():
            if table.parsed:
                shares = (float(METRICS[name](table)) for name in ("parsed_accuracy", "mean_confidence"))
                rows.append([kind or "untouched", strength, table.parsed, *shares])
        media["response_curve"] = _drawing(response_curve(tables))
        media["response_table"] = _table(["kind", "strength", "answers", "accuracy", "mean_confidence"], rows)
    return media


def _counted(answers: Sequence[Prediction]) -> ConfidenceTable:
    return ConfidenceTable.from_predictions([a.confidence for a in answers], [a.correct for a in answers])


def sample_table(
    dataset: PerturbedQueries, answers: Mapping[str, Sequence[Prediction]], size: int, *, taught: bool
) -> Any:
    """A `wandb.Table` of at most `size` queries, evenly spaced, with the image as the model saw it and the answer of each system.

    The image is perturbed again, which gives the same pixels. With `taught` it has the confidence that training assigns to it.
    """
    import wandb

    by_id = {system: {p.id: p for p in predictions} for system, predictions in answers.items()}
    rows = []
    for place in np.linspace(0, len(dataset) - 1, num=min(size, len(dataset))):
        # Validation and evaluation use the noise of epoch 0, whatever the epoch of training.
        sample = dataset[0, round(place)]
        query, given = sample.query, [of_system.get(sample.query.id) for of_system in by_id.values()]
        if any(given):
            photo = Image.fromarray(np.ascontiguousarray(sample.image))
            photo.thumbnail((512, 512))
            cells = [query.id, wandb.Image(photo, file_type="jpg"), query.question, query.answer]
            cells += [*sample.perturbation, *([sample.confidence] if taught else [])]
            rows.append([*cells, *(getattr(p, name, None) for p in given for name in ANSWER_COLUMNS)])
    columns = ["id", "image", "question", "answer", "perturbation", "strength"]
    columns += ["earned_confidence"] if taught else []
    columns += [f"{system}_{name}" if system else name for system in by_id for name in ANSWER_COLUMNS]
    return _table(columns, rows)


def _table(columns: list[str], rows: list[list[Any]]) -> Any:
    # W&B makes a temporary folder when it is imported, and a fork deletes it at its end: import it in the process that logs.
    import wandb

    return wandb.Table(columns, rows)


def _drawing(figure: Any) -> Any:
    import wandb

    # W&B draws a figure with pyplot, which would keep it in memory.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return wandb.Image(Image.open(buffer))
