"""Checks, before a model is loaded, that a level table or an adapter is used under the conditions that it was made under."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.models.base import FACTS, read_object
from vlm_calibration.models.loading import BaseModel, weights_digest
from vlm_calibration.perturbation.levels import AnchoredLevels, ConfidenceLevels
from vlm_calibration.records import DataError

OF_NOISE = ("schedule", "resolution", "shape", "dilate", "absent")
"""Settings of `data.noise` that must be the same, as keys of a table's provenance."""


def provenance_of(
    base: BaseModel, data: PerturbedQueryDataModule, answer_types: Iterable[str]
) -> dict[str, Any]:
    """The conditions that determine the base model's accuracy, as JSON values under the keys of a level table; `seed` is informative."""
    return {
        "model": base.name_or_path,
        "revision": base.revision,
        "weights": weights_digest(base),
        "quantization": base.quantization,
        **{key: getattr(data.noise, key) for key in OF_NOISE},
        "schedule": repr(data.noise.schedule),
        "seed": data.noise.seed,
        "prompt": data.prompt.template,
        "max_pixels": data.max_pixels,
        "grading": {kind: data.grading.level_rule(kind) for kind in answer_types},
    }


def check_levels(levels: ConfidenceLevels | None, base: BaseModel, data: PerturbedQueryDataModule) -> None:
    """Raise a DataError that names both values if anchored levels were measured under other conditions than those of this run.

    Two models are the same if their configuration and weights are, whatever their name or path; if one of them is not on this
    machine, name and revision are compared. Quantisation moves the accuracy by less than a table of some hundred queries can
    resolve, so a difference in it is only a warning.
    """
    if not isinstance(levels, AnchoredLevels):
        return
    table = levels.table.provenance
    use = provenance_of(base, data, levels.answer_types)
    if missing := [key for key in use if key not in table]:
        raise DataError(
            f"{levels.source} has no {', '.join(missing)} in its provenance: measure it again with `vlm-calibration levels fit`"
        )
    compared = {key: f"data.noise.{key}" for key in OF_NOISE}
    compared |= {"prompt": "data.prompt.template", "max_pixels": "data.max_pixels"}
    values = [(setting, table[key], use[key]) for key, setting in compared.items()]
    values += [(f"data.grading ({k})", table["grading"].get(k), rule) for k, rule in use["grading"].items()]
    differences = [f"{setting} was {was!r} and is {now!r}" for setting, was, now in values if was != now]
    both_here = table["weights"] is not None and use["weights"] is not None
    if any(table[key] != use[key] for key in (("weights",) if both_here else ("model", "revision"))):
        differences.insert(0, f"model.base was {_describe_model(table)} and is {_describe_model(use)}")
    if differences:
        raise DataError(
            f"{levels.source} was measured under other conditions: {'; '.join(differences)}: use them, or `vlm-calibration levels fit`"
        )
    if levels.table.ranked:
        rank_zero_warn(
            f"{levels.source}: for open answers it is taught how often the base model holds the gold answer likelier than every wrong "
            f"one, and not how often its answer is correct by data.grading ({data.grading.rule('open')}), which validation and `test` count"
        )
    if table["quantization"] != use["quantization"]:
        rank_zero_warn(
            f"{levels.source} was measured with model.base.quantization {table['quantization']}, and this run uses "
            f"{use['quantization']}: the model's accuracy may differ a little from the taught confidence"
        )


def _describe_model(side: Mapping[str, Any]) -> str:
    revision = f", revision {side['revision']!r}" if side["revision"] else ""
    weights = f"weights {side['weights'][:8]}" if side["weights"] else "weights not on this machine"
    return f"{side['model']!r} ({weights}{revision})"


def differences_from_training(adapters: Mapping[str, str], data: PerturbedQueryDataModule) -> dict[str, str]:
    """Warn of adapters (name -> folder) that are used with another prompt or image size than in training; name -> what differs.

    One without a model card is not compared; a merged model counts as an adapter.
    """
    template, max_pixels, differences = data.prompt.template, data.max_pixels, {}
    for name, folder in adapters.items():
        path = Path(folder) / FACTS
        card = read_object(path) if path.is_file() else {}
        changed = []
        if card.get("template") not in (None, template):
            changed.append(f"data.prompt.template is {template!r} and was {card['template']!r}")
        if card.get("max_pixels", max_pixels) != max_pixels:
            changed.append(f"data.max_pixels is {max_pixels!r} and was {card['max_pixels']!r}")
        if changed:
            differences[name] = " and ".join(changed)
            rank_zero_warn(f"{name!r} is used otherwise than in its training: {differences[name]}")
    return differences
