"""Digests of everything that decides the answers of an evaluation or of `levels fit`, so that a run resumes only its own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import lightning as L

from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.sources.base import queries_digest
from vlm_calibration.models.loading import BaseModel, model_identity
from vlm_calibration.settings import settings_digest

SOFTWARE = ("vlm-calibration", "torch", "transformers", "peft")


def fingerprint(
    trainer: L.Trainer,
    base: BaseModel | None,
    deciding: Mapping[str, Any],
    data: PerturbedQueryDataModule,
    asked: Sequence[str],
) -> dict[str, str]:
    """Setting -> digest of its value, of the content of files and queries as well.

    Content counts as it does in `run_record.run_inputs`, e.g. images by name. The number of processes and the batch size are left
    out, since they change only the last digits of floats.

    Args:
        trainer: of the run.
        base: the base model; None: no model here answers.
        deciding: what else decides the answers, by name.
        data: of the run.
        asked: the data sets that are asked, some of which may not be set.
    """
    decisive: dict[str, Any] = {
        "model.base": base and [base, model_identity(base.name_or_path, base.revision, download=True)],
        **deciding,
        "data.processor": data.processor_name
        and [data.processor_name, model_identity(data.processor_name, data.revision, download=True)],
        **{f"data.{name}": data.splits.get(name) for name in asked},
        **{f"the queries of data.{name}": _queries(data.read_splits(name)) for name in asked},
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
