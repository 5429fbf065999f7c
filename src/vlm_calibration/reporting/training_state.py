"""How far a training came, read from its checkpoint without torch and without running any code that the file names."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

MAX_PICKLE = 1 << 28
"""Bytes of the structure of a checkpoint, without its tensors, that are read at most."""


class TrainingState(NamedTuple):
    """The state of an interrupted training.

    Attributes:
        step: optimiser steps done.
        total: optimiser steps of the whole training; None: unknown.
    """

    step: int
    total: int | None


class _Placeholder:
    """Stands for every object other than numbers, texts, lists and dictionaries."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _Structure(pickle.Unpickler):
    """Reads the dictionaries of a checkpoint; neither imports nor calls what it names."""

    def find_class(self, module: str, name: str) -> Any:
        return dict if (module, name) == ("collections", "OrderedDict") else _Placeholder

    def persistent_load(self, identity: Any) -> None:
        return None


def read_training_state(checkpoint: Path, trainer: Mapping[str, Any]) -> TrainingState:
    """Read how far a training came.

    Args:
        checkpoint: written by Lightning, with the state of the data module.
        trainer: the section `trainer` of the run's configuration.

    Raises:
        ValueError: the file is not a complete checkpoint.
    """
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            [name] = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            if archive.getinfo(name).file_size > MAX_PICKLE:
                raise ValueError(f"{name} is too large")
            with archive.open(name) as file:
                content = _Structure(file).load()
        step = int(content["global_step"])
    # Damaged bytes make pickle raise almost any error.
    except Exception as error:
        raise ValueError(f"not a complete checkpoint: {error}") from error
    positions = [v for v in content.values() if isinstance(v, dict) and v.keys() >= {"queries", "batch_size"}]
    return TrainingState(step, _total_steps(trainer, positions[0] if positions else None))


def _total_steps(trainer: Mapping[str, Any], position: Mapping[str, Any] | None) -> int | None:
    """Optimiser steps of a whole training, from its settings and the size of its data."""
    limits = []
    if (max_steps := trainer.get("max_steps")) not in (None, -1):
        limits.append(int(max_steps))
    epochs = trainer.get("max_epochs")
    if epochs not in (None, -1) and position is not None and position["batch_size"]:
        batches = max(1, position["queries"] // position["batch_size"])
        limit = trainer.get("limit_train_batches")
        if limit is not None:
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        limits.append(epochs * math.ceil(batches / (trainer.get("accumulate_grad_batches") or 1)))
    return min(limits) if limits else None
