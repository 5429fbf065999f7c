"""Digests of everything that decides the answers of an evaluation, so that a run resumes only its own answers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L

from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.sources.base import queries_digest
from vlm_calibration.models.base import adapter_files
from vlm_calibration.models.loading import model_identity
from vlm_calibration.settings import settings_digest
from vlm_calibration.stages.evaluation import BASE, EvaluationModule

SOFTWARE = ("vlm-calibration", "torch", "transformers", "peft")


def fingerprint(
    trainer: L.Trainer, module: EvaluationModule, data: PerturbedQueryDataModule
) -> dict[str, str]:
    """Setting -> digest of its value, of the content of files and queries as well.

    Content counts as it does in `run_record.run_inputs`, e.g. images by name. The number of processes and the batch size are left
    out, since they change only the last digits of floats.
    """
    base = module.base
    decisive: dict[str, Any] = {
        "model.base": base and [base, model_identity(base.name_or_path, base.revision, download=True)],
        "model.adapters": {name: adapter_files(Path(folder)) for name, folder in module.adapters.items()},
        "model.with_base": BASE in module.systems,
        "model.oracle_levels": module.oracle,
        "model.max_new_tokens": module.max_new_tokens,
        "model.estimators": module.estimators,
        "model.probes": module.probes,
        "model.endpoints": {n: e.client.endpoint.deciding for n, e in module.endpoints.items()},
        "data.processor": data.processor_name
        and [data.processor_name, model_identity(data.processor_name, data.revision, download=True)],
        "data.test": data.test,
        "the queries of data.test": _queries(data.read_splits("test")),
        "data.calibration": data.calibration,
        "the queries of data.calibration": _queries(data.read_splits("calibration")),
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


def _queries(splits: Mapping[str, EvalSplit]) -> dict[str, str]:
    return {name: queries_digest(split.source) for name, split in splits.items()}
