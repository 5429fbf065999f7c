"""Where a level table comes from, and whether it is used for what it was measured for.

A table says what one model achieves when it is asked in one way and graded by one rule, under one kind of noise. Under any
other its numbers are wrong, so each of these is compared before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.models.loading import BaseModel, weights_digest
from vlm_calibration.perturbation.levels import AnchoredLevels, ConfidenceLevels
from vlm_calibration.records import DataError

COMPARED = {
    "schedule": "data.noise.schedule",
    "resolution": "data.noise.resolution",
    "shape": "data.noise.shape",
    "dilate": "data.noise.dilate",
    "absent": "data.noise.absent",
    "prompt": "data.prompt.template",
}
"""Key of a table's provenance -> the setting that must be the same."""


def provenance_of(
    base: BaseModel, data: PerturbedQueryDataModule, answer_types: Iterable[str]
) -> dict[str, Any]:
    """What decides how often the base model is right, under the keys of a level table, as JSON has it.

    The seed and the quantisation stand there to be read: another seed draws other noise of the same kind.
    """
    noise = data.noise
    return {
        "model": base.name_or_path,
        "revision": base.revision,
        "weights": weights_digest(base),
        "quantization": base.quantization,
        "schedule": repr(noise.schedule),
        "resolution": noise.resolution,
        "shape": noise.shape,
        "dilate": noise.dilate,
        "absent": noise.absent,
        "seed": noise.seed,
        "prompt": data.prompt.template,
        "grading": {kind: data.grading.rule(kind) for kind in answer_types},
    }


def check_levels(levels: ConfidenceLevels | None, base: BaseModel, data: PerturbedQueryDataModule) -> None:
    """Refuse anchored levels that were measured otherwise than they are used; levels of other kinds are measured on nothing.

    A model is the same if its configuration and weights are, whatever it is called and wherever it lies; where one of the two
    is not on this machine, if name and revision are. Quantising it moves its accuracy by less than a table of some hundred
    queries can tell, so that is warned of.

    Raises:
        DataError: a setting differs, or the table does not say how it was measured; the message names both sides.
    """
    if not isinstance(levels, AnchoredLevels):
        return
    table, use = levels.table.provenance, provenance_of(base, data, levels.answer_types)
    if missing := [key for key in use if key not in table]:
        raise DataError(
            f"{levels.source} does not say its {', '.join(missing)}, so whether it fits this run is not known: measure it "
            "again with `vlm-calibration levels fit`"
        )
    differences = list(_differences(table, use))
    if differences:
        raise DataError(
            f"{levels.source} was measured otherwise than it is used: {'; '.join(differences)}: set what it was measured with, "
            "or measure it again with `vlm-calibration levels fit`"
        )
    if table["quantization"] != use["quantization"]:
        rank_zero_warn(
            f"{levels.source} was measured with model.base.quantization {table['quantization']}, and this run has "
            f"{use['quantization']}: the model may be right a little less or more often than is taught"
        )


def _differences(table: Mapping[str, Any], use: Mapping[str, Any]) -> list[str]:
    pairs = [(setting, table[key], use[key]) for key, setting in COMPARED.items()]
    graded = table["grading"]
    pairs += [(f"data.grading ({kind})", graded.get(kind), rule) for kind, rule in use["grading"].items()]
    found = [f"{setting} was {was!r} and is {now!r}" for setting, was, now in pairs if was != now]
    if not _same_model(table, use):
        found.insert(0, f"model.base was {_model(table)} and is {_model(use)}")
    return found


def _same_model(table: Mapping[str, Any], use: Mapping[str, Any]) -> bool:
    if table["weights"] is not None and use["weights"] is not None:
        return table["weights"] == use["weights"]
    return (table["model"], table["revision"]) == (use["model"], use["revision"])


def _model(side: Mapping[str, Any]) -> str:
    revision = f", revision {side['revision']!r}" if side["revision"] else ""
    weights = f"weights {side['weights'][:8]}" if side["weights"] else "weights not on this machine"
    return f"{side['model']!r} ({weights}{revision})"
