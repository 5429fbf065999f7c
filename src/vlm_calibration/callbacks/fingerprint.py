"""Digests of everything that decides the answers of an evaluation, so that a run resumes only its own answers."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from transformers import PretrainedConfig

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.stages.evaluation import BASE, EvaluationModule

SOFTWARE = ("vlm-calibration", "torch", "transformers", "peft")
CHUNK = 1 << 20


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
        "the queries of data.test": _digest_of(map(repr, data.test_set.queries)),
        "data.calibration": data.calibration,
        "the queries of data.calibration": _digest_of(
            map(repr, data.calibration_set.queries if data.calibration_set else ())
        ),
        "data.noise": data.noise,
        "data.prompt": data.prompt,
        "data.grading": data.grading,
        "trainer.precision": str(trainer.precision),
        "trainer.accelerator": trainer.strategy.root_device.type,
        "trainer.limit_test_batches": repr(trainer.limit_test_batches),
        "installed packages": {name: version(name) for name in SOFTWARE},
    }
    return {name: _digest_of([json.dumps(described(value))]) for name, value in decisive.items()}


def described(value: Any) -> Any:
    """A value as JSON has it, an object as its class and what its constructor was given, as far as it keeps that."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return [[described(key), described(content)] for key, content in value.items()]
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return [
        f"{type(value).__module__}.{type(value).__qualname__}",
        *map(described, settings_of(value).items()),
    ]


def settings_of(value: Any) -> dict[str, Any]:
    """What an object was constructed with: the attributes with the names of parameters, one underscore in front or not."""
    kept = {}
    for name in inspect.signature(type(value)).parameters:
        attribute = name if hasattr(value, name) else f"_{name}"
        if hasattr(value, attribute):
            kept[name] = getattr(value, attribute)
    return kept


def _weights(folder: Path) -> dict[str, str]:
    """The digest of every file that peft reads from an adapter's folder."""
    return {
        path.name: _digest_of(_chunks(path)) for path in sorted(folder.glob("adapter_*")) if path.is_file()
    }


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


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _digest_of(parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode() + b"\n")
    return digest.hexdigest()
