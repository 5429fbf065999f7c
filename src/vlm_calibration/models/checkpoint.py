"""The weights files of a model, under the names that its publisher gave: find a model's weights in them, copy them with some replaced.

transformers renames tensors while it loads a checkpoint, and for some families saves them under other names than the published ones,
which alone vLLM and others know. Weights are found by their values, which needs no table of names.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from vlm_calibration.files import name_some, write_json
from vlm_calibration.models.base import BaseModel, read_object
from vlm_calibration.models.loading import local_folder, weight_files
from vlm_calibration.records import DataError

FEW = 64
"""Number of values that are compared before all are."""


class Stored(NamedTuple):
    """Name and dtype of a weight's tensor in a checkpoint."""

    name: str
    dtype: torch.dtype


class Checkpoint(NamedTuple):
    """The files of a model on this machine.

    Attributes:
        folder: has `config.json`; of a model on the Hub its snapshot in the cache.
        files: all weights files, safetensors or PyTorch's.
    """

    folder: Path
    files: tuple[Path, ...]


def find_checkpoint(base: BaseModel) -> Checkpoint:
    """The files of a model that has been loaded.

    Raises:
        DataError: files of its weights are missing on this machine.
    """
    folder = local_folder(base)
    files = weight_files(folder) if folder is not None else None
    if folder is None or files is None:
        raise DataError(
            f"the weights of the model {base.name_or_path!r} are not among the files of {folder or 'the cache'}: "
            "expected model.safetensors or pytorch_model.bin, or all files that its index names"
        )
    return Checkpoint(folder, tuple(files))


def find_weights(weights: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Stored]:
    """Find weights of a loaded model among the tensors of its checkpoint.

    A weight is the tensor with the same values in the same order, whatever the shapes. Of several such tensors it is the one whose
    name ends most like the weight's.

    Args:
        weights: name in the model -> weight, float32.
        checkpoint: what the model was loaded from.

    Returns:
        Name in the model -> the tensor. No two weights have the same one.

    Raises:
        ValueError: a weight is no tensor of the checkpoint, or cannot be told from another one.
    """
    flat = {name: weight.detach().flatten() for name, weight in weights.items()}
    equal: dict[str, list[Stored]] = {name: [] for name in weights}
    for path in checkpoint.files:
        for stored, tensor in _read(path)[0].items():
            values = tensor.flatten()
            few = values[:FEW].float()
            for name, weight in flat.items():
                alike = len(weight) == len(values) and torch.equal(weight[:FEW], few)
                if alike and torch.equal(weight, values.float()):
                    equal[name].append(Stored(stored, tensor.dtype))
    found = {name: _most_alike(name, candidates) for name, candidates in equal.items()}
    times = Counter(stored.name for stored in found.values())
    if shared := [name for name, stored in found.items() if times[stored.name] > 1]:
        raise ValueError(
            f"the weights {name_some(shared, len(shared))} have the same values, and the checkpoint does not tell them apart"
        )
    return found


def _most_alike(name: str, candidates: list[Stored]) -> Stored:
    """The candidate whose dotted name shares the longest end with the weight's."""
    if not candidates:
        raise ValueError(
            f"the weight {name} is not stored as one tensor in the checkpoint, so it cannot be written under its name"
        )

    def common_parts(stored: Stored) -> int:
        pairs = zip(name.split(".")[::-1], stored.name.split(".")[::-1], strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    most = max(map(common_parts, candidates))
    best = [stored for stored in candidates if common_parts(stored) == most]
    if len(best) > 1:
        raise ValueError(
            f"the weight {name} has the same values as several tensors of the checkpoint: {best[0].name} and {best[1].name}"
        )
    return best[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors of a weights file by name, and its metadata."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Tensors of such a file may share memory, which safetensors refuses.
    return {name: tensor.clone() for name, tensor in state.items()}, {"format": "pt"}


def copy_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    replaced: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    code: bool,
) -> None:
    """Write a copy in which some tensors are replaced; names, shapes, files and configuration stay. Holds one file in memory.

    `generation_config.json` is left out.

    Args:
        checkpoint: what is copied; files of PyTorch become safetensors.
        folder: where to; it exists.
        replaced: name in the checkpoint -> the tensor to write instead.
        dtype: of all floating-point tensors; None: each keeps its own.
        code: copy the modelling code too.
    """
    size = 0
    for path in checkpoint.files:
        tensors, metadata = _read(path)
        written = {name: _converted(tensor, replaced.get(name), dtype) for name, tensor in tensors.items()}
        save_file(written, folder / _safetensors_name(path.name), metadata)
        size += sum(tensor.nbytes for tensor in written.values())
    if checkpoint.files[0].name not in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        is_safetensors = checkpoint.files[0].suffix == ".safetensors"
        index = read_object(
            checkpoint.folder / (SAFE_WEIGHTS_INDEX_NAME if is_safetensors else WEIGHTS_INDEX_NAME)
        )
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        index["weight_map"] = {name: _safetensors_name(file) for name, file in index["weight_map"].items()}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    for path in checkpoint.folder.glob("*.py") if code else ():
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")
    if dtype is not None:
        config = {"dtype": "", **read_object(folder / "config.json")}
        write_json(folder / "config.json", _with_dtype(config, str(dtype).split(".")[1]))


def _converted(stored: Tensor, new: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    kind = dtype if dtype is not None and stored.is_floating_point() else stored.dtype
    return (stored if new is None else new.detach().reshape(stored.shape)).to(kind).contiguous()


def _safetensors_name(name: str) -> str:
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with `dtype` wherever it, or a configuration in it, names one."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }
