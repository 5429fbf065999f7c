"""Digests of everything that decides the answers of an evaluation, so that a run resumes only its own answers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from transformers import PretrainedConfig

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.settings import digest, file_digest, settings_digest
from vlm_calibration.stages.evaluation import BASE, EvaluationModule

SOFTWARE = ("vlm-calibration", "torch", "transformers", "peft")


def fingerprint(
    trainer: L.Trainer, module: EvaluationModule, data: PerturbedQueryDataModule
) -> dict[str, str]:
    """Setting -> digest of its value, of the content of files and queries as well.

    Images count by name, and the base model's files by size and date. The number of processes and the batch size are left
    out, since they change only the last digits of floats.
    """
    base = module.base
    decisive: dict[str, Any] = {
        "model.base": [base, _state(base.name_or_path, base.revision)],
        "model.adapters": {name: _weights(Path(folder)) for name, folder in module.adapters.items()},
        "model.with_base": BASE in module.systems,
        "model.oracle_levels": module.oracle,
        "model.max_new_tokens": module.max_new_tokens,
        "model.estimators": module.estimators,
        "data.processor": [data.processor_name, _state(str(data.processor_name), data.revision)],
        "data.test": data.test,
        "the queries of data.test": digest(map(repr, data.test_set.queries)),
        "data.calibration": data.calibration,
        "the queries of data.calibration": digest(
            map(repr, data.calibration_set.queries if data.calibration_set else ())
        ),
        "data.noise": data.noise,
        "data.prompt": data.prompt,
        "data.max_pixels": data.max_pixels,
        "data.grading": data.grading,
        "trainer.precision": str(trainer.precision),
        "trainer.accelerator": trainer.strategy.root_device.type,
        "trainer.limit_test_batches": repr(trainer.limit_test_batches),
        "installed packages": {name: version(name) for name in SOFTWARE},
    }
    return {name: settings_digest(value) for name, value in decisive.items()}


def _weights(folder: Path) -> dict[str, str]:
    """The digest of every file that peft reads from an adapter's folder."""
    return {path.name: file_digest(path) for path in sorted(folder.glob("adapter_*")) if path.is_file()}


def _state(name_or_path: str, revision: str | None) -> Any:
    """The state of a model: sizes and dates of the files in a folder, or the commit on the Hub."""
    folder = Path(name_or_path)
    if folder.is_dir():
        stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    try:
        return PretrainedConfig.get_config_dict(name_or_path, revision=revision)[0].get("_commit_hash")
    except OSError:
        # There is no such model; loading it raises a clear error before any query is asked.
        return None
