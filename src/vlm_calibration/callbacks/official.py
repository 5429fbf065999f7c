"""Scores an evaluation on POPE or AMBER by the benchmark's own rules, and writes the files that its script reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from vlm_calibration.benchmarks.files import OFFICIAL, OfficialCounts, official_scores
from vlm_calibration.callbacks.predictions import require_writer
from vlm_calibration.data.dataset import EvalSplit, with_split_name
from vlm_calibration.data.sources.benchmark import BenchmarkSource
from vlm_calibration.estimators.predictions import PREDICTIONS, read_predictions
from vlm_calibration.files import json_number, name_some, read_json, write_json, write_rows
from vlm_calibration.records import DataError
from vlm_calibration.reporting.runs import METRICS
from vlm_calibration.reporting.tables import official_table


class OfficialScores(L.Callback):
    """Adds `official/...` to each system's `metrics.json`, and writes answer files for the benchmarks' scripts.

    It scores the splits of `data.test` that ask a benchmark's questions without noise. It reads the files of
    `PredictionWriter` in one process, so the number of answering processes does not matter; place it after that callback.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_writer(trainer, self)
        test: Mapping[str, EvalSplit] = trainer.datamodule.test  # type: ignore[attr-defined]
        if not any(isinstance(split.source, BenchmarkSource) for split in test.values()):
            asked = f"data.test asks no questions of POPE or AMBER, but {name_some(list(test), len(test))}"
            advice = "a preset of data after the benchmark's replaces its questions, so leave it out"
            raise DataError(f"{asked}: {advice}")

    def on_test_end(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            test: Mapping[str, EvalSplit] = trainer.datamodule.test  # type: ignore[attr-defined]
            sources = {name: split.source for name, split in test.items() if split.noise == "none"}
            splits = {name: s for name, s in sources.items() if isinstance(s, BenchmarkSource)}
            folder = Path(trainer.default_root_dir)
            results = {system: _score(folder / system, splits) for system in module.results}
            if any(results.values()):
                Console().print(official_table(results))
            for system, scores in results.items():
                for logger in trainer.loggers if scores else ():
                    logger.log_metrics({f"test/{system}/{name}": value for name, value in scores.items()})
        trainer.strategy.barrier("official scores")


def _score(folder: Path, splits: Mapping[str, BenchmarkSource]) -> dict[str, float]:
    """Score one system's predictions and write the files into its folder."""
    replies_by_id = {p.id: (p.text, p.confidence) for p in read_predictions(folder / PREDICTIONS)}
    counts: dict[str, OfficialCounts] = {}
    for name, source in splits.items():
        ids = [with_split_name(query, name).id for query in source.queries()]
        if missing := [i for i in ids if i not in replies_by_id]:
            unanswered = f"{len(missing)} of {len(ids)}: {name_some(missing, len(missing))}"
            rank_zero_warn(f"no official scores of data.test.{name}: no answer to {unanswered}")
            continue
        replies = [replies_by_id[i] for i in ids]
        counts[name] = source.counts.of(source.queries(), [text for text, _ in replies])
        for end, rows in source.answer_files(replies).items():
            file = folder / OFFICIAL / (f"{name}.{end}" if name else end)
            write_rows(file, rows, lines=end.endswith(".jsonl"))
    scores = official_scores(counts) if counts else {}
    metrics = read_json(folder / METRICS)
    write_json(folder / METRICS, metrics | {k: json_number(k, v) for k, v in scores.items()})
    return scores
