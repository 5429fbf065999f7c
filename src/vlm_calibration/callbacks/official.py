"""Scores an evaluation on POPE or AMBER by the benchmark's own rules, beside ours, and writes what its script takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from vlm_calibration.benchmarks.files import some
from vlm_calibration.benchmarks.official import OfficialCounts, official_scores
from vlm_calibration.callbacks.predictions import PredictionWriter, system_folder
from vlm_calibration.data.dataset import EvalSplit, named
from vlm_calibration.data.sources.benchmark import BenchmarkSource
from vlm_calibration.estimators.predictions import read_predictions
from vlm_calibration.files import json_number, write_json, write_rows
from vlm_calibration.records import DataError
from vlm_calibration.reporting.tables import official_table
from vlm_calibration.stages.scoring import HasResults

FOLDER = "official"
"""Folder within a system's, of the files for the benchmarks' scripts."""


class OfficialScores(L.Callback):
    """`official/...` in each system's `metrics.json`, and answer files for the benchmarks' scripts in its folder `official`.

    Parts of `data.test` that ask a benchmark's questions without noise are scored. This reads what `PredictionWriter` has
    written, in one process, so it does not matter how many gave the answers; it must stand behind it.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)]
        if not any(isinstance(callback, PredictionWriter) for callback in before):
            raise DataError("trainer.callbacks: OfficialScores needs a PredictionWriter before it")

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        parts = benchmark_parts(trainer.datamodule.test)  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            systems = cast(HasResults, module).results
            found = {system: _score(system_folder(trainer, system), parts) for system in systems}
            if any(found.values()):
                Console().print(official_table(found))
            for system, scores in found.items():
                for logger in trainer.loggers if scores else ():
                    logger.log_metrics({f"test/{system}/{name}": value for name, value in scores.items()})
        trainer.strategy.barrier("official scores")


def benchmark_parts(test: Mapping[str, EvalSplit]) -> dict[str, BenchmarkSource]:
    """The parts of an evaluation that a benchmark's own rules apply to, by name."""
    return {
        name: part.source
        for name, part in test.items()
        if isinstance(part.source, BenchmarkSource) and part.noise == "none"
    }


def _score(folder: Path, parts: Mapping[str, BenchmarkSource]) -> dict[str, float]:
    """Score one system's predictions and write the files into its folder."""
    given = {p.id: (p.text, p.confidence) for p in read_predictions(folder / "predictions.jsonl")}
    counts: dict[str, OfficialCounts] = {}
    for name, source in parts.items():
        ids = [named(query, name).id for query in source.queries()]
        if missing := [i for i in ids if i not in given]:
            rank_zero_warn(
                f"no official scores of data.test.{name}: no answer to {len(missing)} of {len(ids)}: {some(missing)}"
            )
            continue
        replies = [given[i] for i in ids]
        counts[name] = source.count([text for text, _ in replies])
        for end, rows in source.answer_files(replies).items():
            file = folder / FOLDER / (f"{name}.{end}" if name else end)
            write_rows(file, rows, lines=end.endswith(".jsonl"))
    scores = official_scores(counts) if counts else {}
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    write_json(folder / "metrics.json", metrics | {k: json_number(k, v) for k, v in scores.items()})
    return scores
